"""Names of a package whose modules are imported on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["lazily", "make_callable"]


def lazily(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Create the `__getattr__` of a package.

    Args:
        package: Its `__name__`.
        modules: Name in the package -> the module that defines it, or that it is.

    Returns:
        The function; it raises `AttributeError` for other names.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(modules[name])
        return module if modules[name] == f"{package}.{name}" else getattr(module, name)

    return __getattr__


def make_callable(package: str, module: str) -> None:
    """Make a package callable as the function of its own name, such as `visionattn.export(...)`.

    Args:
        package: Its `__name__`, during its import.
        module: The module that defines the function, imported at the first call.
    """
    name = package.rpartition(".")[2]

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
