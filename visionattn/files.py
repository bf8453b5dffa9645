"""Atomic writing with one rule for existing files; reading the package's state files with checks."""

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
"""Prefix of temporary file names; a machine identifier and the process number follow."""

# Processes of another machine may write to a shared folder.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY_NAME = re.compile(re.escape(f"{TEMPORARY}{_MACHINE}-") + r"(\d+)-")
_LONGEST_SUFFIX = 64  # in temporary names, whose length the file system limits


def check_output(path: str | Path, overwrite: bool = False, suffixes: tuple[str, ...] | None = None) -> Path:
    """The rule of all commands for output files: an existing file is kept unless `overwrite` is given.

    Args:
        path: Output path. A symbolic link is resolved.
        overwrite: Replace an existing file.
        suffixes: Accepted suffixes, such as `(".onnx",)`, in upper or lower case; None accepts all.

    Returns:
        The path.

    Raises:
        InputError: The suffix is not accepted, the file exists and `overwrite` was not given, or the path is a
            folder, a device, a pipe or a socket.
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
        InputError: A component of the path is not a folder, or the name is invalid.
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
    """Yield a temporary path to write to; the file appears under `path` only if the block ends without an error.

    The temporary file is in the same folder, so that the final rename is atomic, and keeps the suffix of `path`, so
    that writers that choose a format by suffix still work. Its name begins with `TEMPORARY`, which every reader of
    folders skips; leftovers of killed processes in the folder are removed. A symbolic link keeps pointing to the file
    that is replaced.

    Args:
        path: Path of the finished file. Missing folders are created.

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
        # mkstemp creates a private file; give it the mode of an ordinary open().
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
    """Yield a temporary folder to fill; it appears under `path` only if the block ends without an error.

    Args:
        path: Path of the finished folder. Missing parents are created. An empty folder is replaced.
        overwrite: Replace a folder that contains `mark`.
        mark: Name of a file that only such folders contain, so that no other is replaced.

    Raises:
        InputError: Something else exists there, or such a folder and `overwrite` was not given.
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
    """Remove temporary files and folders of processes that have ended."""
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
    """Lock a folder for one writer: a second one is refused. A killed process releases it.

    Args:
        folder: The folder, which is created if missing. A file `.lock` stays in it.

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
    except (OSError, ValueError) as error:  # a name with a NUL byte raises ValueError
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
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise DataError(f"Could not read {shorten(path)}: it is not a regular file.")
        if status.st_size > limit:
            raise DataError(f"Could not read {shorten(path)}: it has more than the {limit:,} bytes that are read.")
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Could not read {shorten(path)}: it is not text in UTF-8 (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise DataError(f"Could not read {shorten(path)}: {getattr(error, 'strerror', None) or error}.") from error
    if "\0" in text:
        raise DataError(f"Could not read {shorten(path)}: it is not text: it holds NUL bytes.")
    return text


def write_state(path: str | Path, content: Any) -> None:
    """Write tensors and plain values with `torch.save`, atomically.

    Raises:
        StorageError: The file could not be written.
    """
    # torch.save reports a full disk as an error of its archive format; writing bytes raises the system's error.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_json(path: str | Path, schema: Mapping[str, Any], limit: int = 2**28) -> dict[str, Any]:
    """Read one of the package's own JSON files, and check it against a schema.

    Args:
        path: The file.
        schema: For each entry its type, a tuple of types, a list of one schema for a list of any length,
            or a nested schema. Other entries are allowed.
        limit: The largest file that is read, in bytes.

    Raises:
        DataError: The file is missing, damaged or too large, or an entry is missing or has another type.
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
    """The first violation of the schema in `content` (see `read_json`), or None.

    Args:
        content: Content of the file.
        schema: The schema.
        where: Name of `content` in the message.
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
