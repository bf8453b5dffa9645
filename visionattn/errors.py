"""Errors whose messages say what was given, what is accepted and what to do.

Every error that user input can cause derives from `VisionAttnError`; the command line prints only its message,
without a stack trace.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "InputError",
    "MissingPackageError",
    "StorageError",
    "UnknownNameError",
    "VisionAttnError",
    "explaining_memory",
    "require",
    "shorten",
]


class VisionAttnError(Exception):
    """Base of all errors that the package raises for user mistakes."""

    def __str__(self) -> str:
        return " ".join(str(arg) for arg in self.args)


class InputError(VisionAttnError, ValueError):
    """A tensor, an image or an argument has a size, dtype or value that is not accepted."""


class UnknownNameError(VisionAttnError, LookupError):
    """A model, recipe or class of that name does not exist."""


class CheckpointError(VisionAttnError, RuntimeError):
    """A weight file is unreadable, or belongs to another model."""


class DataError(VisionAttnError, RuntimeError):
    """A folder or file of training or test data is missing, empty or unreadable."""


class ConfigError(VisionAttnError, ValueError):
    """A configuration refers to something that does not exist, or combines options that exclude each other."""


class ExportError(VisionAttnError, RuntimeError):
    """A model could not be exported, or the exported file does not compute what the model computes."""


class StorageError(VisionAttnError, OSError):
    """A file could not be written: no space, no permission."""


class MissingPackageError(VisionAttnError, ImportError):
    """An optional package is not installed."""


def shorten(value: object, width: int = 120) -> str:
    """A value for a message: on one line, without control characters, shortened in the middle if it is long.

    Args:
        value: A name, a path, another library's message.
        width: Maximum number of characters.
    """
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    if len(text) <= width:
        return text
    half = (width - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


@contextmanager
def explaining_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an allocation failure into one `InputError`.

    Args:
        what: What does not fit, such as "480 x 640 pixels".
        remedy: What to do.

    Raises:
        InputError: There is not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # PyTorch's allocators raise RuntimeErrors, as do sizes beyond 64 bits.
        told = isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("allocate", "overflow"))
        if not told or isinstance(error, VisionAttnError):
            raise
        raise InputError(f"{what} do not fit the memory: {remedy}.") from error


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: Module to import, such as `"onnxruntime"`.
        extra: Extra of this package that installs it, such as `"export"`.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"This needs the package {module!r} ({error}). Install it with: pip install 'visionattn[{extra}]'"
        ) from error
