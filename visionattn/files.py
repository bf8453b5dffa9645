"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visionattn.errors import StorageError

__all__ = ["atomic_path"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name to write to; the file appears under `path` only when the block ends without an error.

    The temporary file lies in the same folder, so that the final rename is atomic, and keeps the suffix of `path`, so
    that writers that choose a format by suffix still do.

    Args:
        path: Where the finished file shall stand. Missing folders are made.

    Raises:
        StorageError: The file could not be written (disk full, no permission). Nothing is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes the file private; give it the mode that an ordinary open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"Could not write {path}: {error.strerror or error}. Nothing was left there.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
