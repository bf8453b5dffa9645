"""Writing files whole or not at all, by one rule for what exists; reading our own state files with checks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from visionattn.errors import DataError, InputError, StorageError, shorten

__all__ = [
    "TEMPORARY",
    "atomic_folder",
    "atomic_path",
    "check_folder",
    "check_output",
    "exclusive",
    "read_json",
    "read_text",
    "write_state",
]

TEMPORARY = ".visionattn-"
"""What the names of temporary files begin with; a mark of the machine and the number of the process follow."""

# Another machine's processes may write into a shared folder.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY_NAME = re.compile(re.escape(f"{TEMPORARY}{_MACHINE}-") + r"(\d+)-")
_LONGEST_SUFFIX = 64  # of a temporary name, whose length the file system limits


def check_output(path: str | Path, overwrite: bool = False, suffixes: tuple[str, ...] | None = None) -> Path:
    """The one rule of all commands for what they write: an existing file stays unless `overwrite` is given.

    Args:
        path: Where the output goes. A symbolic link stands for the file that it points to.
        overwrite: Replace a file that exists.
        suffixes: The suffixes that may be written, such as `(".onnx",)`, in any case of letters; None allows all.

    Returns:
        The path.

    Raises:
        InputError: The suffix is another one, the file exists and `overwrite` was not given, or the path is a folder, a
            device, a pipe or a socket.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise InputError(f"Cannot write {shorten(path)}: the file name must end in {' or '.join(suffixes)}.")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write {shorten(path)}: {getattr(error, 'strerror', None) or error}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"Cannot write {shorten(path)}: it is {kind}. Name a file.")
    if not overwrite:
        raise InputError(f"{shorten(path)} exists. Give --overwrite to replace it, or name another output.")
    return path


def check_folder(path: str | Path) -> Path:
    """Refuse a path that cannot become a folder: another kind of file, an over-long name, a NUL byte.

    Raises:
        InputError: The path, or a part of it, stands for something that is not a folder, or no file can have that name.
    """
    path = Path(path)
    for part in (path, *path.parents):
        try:
            mode = os.stat(part).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cannot write to {shorten(path)}: {getattr(error, 'strerror', None) or error}."
            ) from error
        if not stat.S_ISDIR(mode):
            raise InputError(f"Cannot write to {shorten(path)}: {shorten(part)} is not a folder.")
        break
    return path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name to write to; the file appears under `path` only when the block ends without an error.

    The temporary file lies in the same folder, so that the final rename is atomic, and keeps the suffix of `path`, so
    that writers that choose a format by suffix still do. Its name begins with `TEMPORARY`, which every reader of
    folders leaves out; what a killed process left in the folder is removed. A symbolic link keeps pointing to the file
    that is replaced.

    Args:
        path: Where the finished file shall stand. Missing folders are made.

    Raises:
        StorageError: The file could not be written (disk full, no permission, not a regular file). No partial file is
            left.
    """
    temporary = None
    try:
        path = Path(path).resolve()
        if path.exists() and not path.is_file():
            raise StorageError(f"Could not write {shorten(path)}: it is not a regular file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        prefix = f"{TEMPORARY}{_MACHINE}-{os.getpid()}-"
        suffix = path.suffix if len(path.suffix) <= _LONGEST_SUFFIX else ""
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes the file private; give it the mode that an ordinary open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        # A loop of symbolic links is a RuntimeError before Python 3.13; other RuntimeErrors are the block's own.
        if isinstance(error, RuntimeError) and temporary is not None:
            raise
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"Could not write {shorten(path)}: {reason}. No partial file was left.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False, mark: str = "") -> Iterator[Path]:
    """Give a temporary folder to fill; it appears under `path` only when the block ends without an error.

    Args:
        path: Where the finished folder shall stand. Missing parents are made. A folder that is empty is replaced.
        overwrite: Replace a folder that holds `mark`.
        mark: Name of a file that only such folders hold, so that no other is replaced.

    Raises:
        InputError: Something else stands there, or such a folder and `overwrite` was not given.
        StorageError: The folder could not be written. No partial one is left.
    """
    path = check_folder(path)
    try:
        taken = path.exists() and any(path.iterdir())
        if taken and not (mark and (path / mark).is_file()):
            raise InputError(f"The folder {shorten(path)} holds other files: name an empty one, or a new one.")
        if taken and not overwrite:
            raise InputError(f"{shorten(path)} exists. Give --overwrite to replace it, or name another folder.")
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        prefix = f"{TEMPORARY}{_MACHINE}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix, ignore_cleanup_errors=True) as room:
            new, old = Path(room) / "new", Path(room) / "old"
            new.mkdir()
            yield new
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
    except (StorageError, InputError):
        raise
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"Could not write {shorten(path)}: {reason}. No partial folder was left.") from error


def _sweep(folder: Path) -> None:
    """Remove temporary files and folders of processes that run no more."""
    for name in os.listdir(folder):
        match = _TEMPORARY_NAME.match(name)
        if match and not _runs(int(match.group(1))):
            with contextlib.suppress(OSError):
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                else:
                    (folder / name).unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a folder for one writer: a second one is refused. A killed process releases it.

    Args:
        folder: The folder, which is made where it is missing. A file `.lock` stays in it.

    Raises:
        StorageError: Another process writes to it, or nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(f"Another run is writing to {shorten(folder)}. Wait for it, or name another one.") from error
    except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"Cannot write to the folder {shorten(folder)}: {reason}.") from error
    try:
        yield
    finally:
        lock.release()


def read_text(path: str | Path, limit: int = 2**28) -> str:
    """Read a user's text file: UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        limit: The largest file that is read, in bytes.

    Raises:
        DataError: The file is missing, not a regular file, too large, or not UTF-8 text.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for its writer for ever
            raise DataError(f"Could not read {shorten(path)}: it is not a regular file.")
        if status.st_size > limit:
            raise DataError(f"Could not read {shorten(path)}: it has more than the {limit:,} bytes that are read.")
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Could not read {shorten(path)}: it is not text in UTF-8 (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise DataError(f"Could not read {shorten(path)}: {getattr(error, 'strerror', None) or error}.") from error
    if "\0" in text:
        raise DataError(f"Could not read {shorten(path)}: it holds NUL bytes, so that it is not text.")
    return text


def write_state(path: str | Path, content: Any) -> None:
    """Write tensors and plain values with `torch.save`, whole or not at all.

    Raises:
        StorageError: The file could not be written.
    """
    # torch.save reports a full disk as an error of its archive format; writing bytes gives the system's words.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_json(path: str | Path, schema: Mapping[str, Any], limit: int = 2**28) -> dict[str, Any]:
    """Read one of the package's own JSON files, and check that it says what it must.

    Args:
        path: The file.
        schema: For each entry the type it must have, a tuple of types, a list of one schema for a list of any length,
            or a schema of its own. Other entries are allowed.
        limit: The largest file that is read, in bytes.

    Raises:
        DataError: The file is missing, damaged or too large, or an entry is missing or of another type.
    """
    path = Path(path)
    try:
        if path.stat().st_size > limit or not path.is_file():
            raise DataError(f"{shorten(path)} is too large, or not a regular file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"Could not read {shorten(path)}: {shorten(reason)}.") from error
    wrong = violation(content, schema)
    if wrong:
        raise DataError(f"{shorten(path)} is damaged: {wrong}.")
    return content


def violation(content: Any, schema: Any, where: str = "") -> str | None:
    """What in `content` is not as the schema says (see `read_json`), or None.

    Args:
        content: What was read.
        schema: What it must be.
        where: Name of `content` in the answer.
    """
    if isinstance(schema, Mapping):
        if not isinstance(content, dict):
            return f"{where or 'its content'} is not a dictionary"
        for key, part in schema.items():
            if key not in content:
                return f"the entry {where}{key} is missing"
            if wrong := violation(content[key], part, f"{where}{key}"):
                return wrong
        return None
    if isinstance(schema, list):
        if not isinstance(content, list):
            return f"{where} is not a list"
        found = (violation(item, schema[0], f"{where}[{index}]") for index, item in enumerate(content))
        return next((wrong for wrong in found if wrong), None)
    types = schema if isinstance(schema, tuple) else (schema,)
    # bool is a subclass of int, and a count that is True is damaged.
    fits = isinstance(content, types) and (bool in types or not isinstance(content, bool))
    return None if fits else f"{where} must be {' or '.join(t.__name__ for t in types)}, not {type(content).__name__}"
