"""Modules that have another name now: the old one still imports, and says the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "install"]

MOVED = {
    "visionattn.data.luma": "visionattn.metrics.luma",
    "visionattn.data.match_errors": "visionattn.metrics.matching",
    "visionattn.data.pictures": "visionattn.data.images",
    "visionattn.data.ranking": "visionattn.metrics.ranking",
}
"""Old name of a module -> its name now."""

_RENAMED = {"visionattn.data.pictures": {"find_pictures": "find_images"}}


class _Finder(MetaPathFinder, Loader):
    """Stands behind Python's own finders, which know the modules that exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"The module {old} is now {new}.", FutureWarning, stacklevel=2)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})
        vars(module).update({name: names[renamed] for name, renamed in _RENAMED.get(old, {}).items()})


def install() -> None:
    """Let Python import modules by their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
