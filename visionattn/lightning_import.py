"""Importing Lightning without scipy.signal.

Lightning imports torchmetrics, which imports scipy.signal and with it most of SciPy, a second of CPU time, to add the
name `scipy.signal.hamming` for a package of speech metrics. The import here leaves SciPy to those who use it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from visionattn.errors import require

__all__ = ["import_lightning"]

_NAME = "scipy.signal"


class _StandIn(ModuleType):
    """Stands for scipy.signal during the import; the use of anything but `hamming` imports the real one."""

    hamming = None  # torchmetrics adds it only if it is missing

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # asked by the import system
        _remove(self)
        return getattr(importlib.import_module(_NAME), name)


def import_lightning(module: str = "lightning") -> ModuleType:
    """Import Lightning or a module of it.

    Raises:
        MissingPackageError: Lightning is not installed.
    """
    if _NAME in sys.modules or "torchmetrics" in sys.modules:
        return require(module, "train")
    stand_in = _StandIn(_NAME)
    sys.modules[_NAME] = stand_in
    try:
        return require(module, "train")
    finally:
        _remove(stand_in)


def _remove(stand_in: _StandIn) -> None:
    if sys.modules.get(_NAME) is stand_in:
        del sys.modules[_NAME]
