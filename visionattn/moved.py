"""Renamed modules and arguments: the old name still works, with a warning that gives the new one."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

__all__ = ["MOVED", "install", "renamed_keywords"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

MOVED = {
    "visionattn.data.albumentations_adapter": "visionattn.data.classify.albumentations_adapter",
    "visionattn.data.attribute_batches": "visionattn.data.retrieval.attribute_batches",
    "visionattn.data.bicubic": "visionattn.data.restore.bicubic",
    "visionattn.data.catalogue": "visionattn.data.retrieval.catalogue",
    "visionattn.data.catalogue_files": "visionattn.data.retrieval.catalogue_files",
    "visionattn.data.digits": "visionattn.data.classify.digits",
    "visionattn.data.disparity": "visionattn.data.matching.disparity",
    "visionattn.data.embedding": "visionattn.data.retrieval.embedding",
    "visionattn.data.flow_sets": "visionattn.data.matching.flow_sets",
    "visionattn.data.luma": "visionattn.metrics.luma",
    "visionattn.data.match": "visionattn.data.matching.datamodule",
    "visionattn.data.match_errors": "visionattn.metrics.matching",
    "visionattn.data.match_pairs": "visionattn.data.matching.pairs",
    "visionattn.data.mnist": "visionattn.data.classify.mnist",
    "visionattn.data.pictures": "visionattn.data.images",
    "visionattn.data.ranking": "visionattn.metrics.ranking",
    "visionattn.data.scene_surfaces": "visionattn.data.matching.surfaces",
    "visionattn.data.scene_textures": "visionattn.data.matching.textures",
    "visionattn.data.sources": "visionattn.data.classify.sources",
    "visionattn.data.stereo": "visionattn.data.matching.stereo",
    "visionattn.data.stereo_files": "visionattn.data.matching.stereo_files",
    "visionattn.data.stereo_scenes": "visionattn.data.matching.scenes",
    "visionattn.data.stereo_sets": "visionattn.data.matching.stereo_sets",
    "visionattn.data.transforms": "visionattn.data.classify.transforms",
    "visionattn.data.triplets": "visionattn.data.retrieval.triplets",
    "visionattn.predict.film": "visionattn.predict.videos.film",
    "visionattn.predict.image_index": "visionattn.search.image_index",
    "visionattn.predict.index_building": "visionattn.search.building",
    "visionattn.predict.index_files": "visionattn.search.files",
    "visionattn.predict.matroska": "visionattn.predict.videos.matroska",
    "visionattn.predict.metadata": "visionattn.predict.images.metadata",
    "visionattn.predict.opening": "visionattn.opening",
    "visionattn.predict.picture": "visionattn.predict.images.picture",
    "visionattn.predict.png": "visionattn.predict.images.png",
    "visionattn.predict.search_cli": "visionattn.search.cli",
    "visionattn.predict.tiff": "visionattn.predict.images.tiff",
    "visionattn.predict.video": "visionattn.predict.videos.video",
    "visionattn.probe.backbone": "visionattn.probe.tokens.backbone",
    "visionattn.probe.banks": "visionattn.probe.heads.banks",
    "visionattn.probe.features": "visionattn.probe.tokens.features",
    "visionattn.probe.head_training": "visionattn.probe.heads.training",
    "visionattn.probe.live": "visionattn.probe.tokens.live",
    "visionattn.probe.loading": "visionattn.probe.tokens.loading",
    "visionattn.probe.maps": "visionattn.probe.report.maps",
    "visionattn.probe.poolings": "visionattn.probe.heads.poolings",
    "visionattn.probe.poolings.base": "visionattn.probe.heads.poolings.base",
    "visionattn.probe.poolings.learned_query": "visionattn.probe.heads.poolings.learned_query",
    "visionattn.probe.poolings.own_weights": "visionattn.probe.heads.poolings.own_weights",
    "visionattn.probe.rendering": "visionattn.probe.report.rendering",
    "visionattn.probe.results": "visionattn.probe.heads.results",
    "visionattn.probe.sections": "visionattn.probe.report.sections",
    "visionattn.probe.shards": "visionattn.probe.tokens.shards",
}
"""Old name of a module -> new name."""

_RENAMED = {
    "visionattn.data.pictures": {"find_pictures": "find_images"},
    "visionattn.predict.opening": {"pretrained": "create_pretrained"},
}


class _Finder(MetaPathFinder, Loader):
    """Follows Python's own finders, which find the modules that exist."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=any(old.startswith(f"{fullname}.") for old in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"The module {old} is now {new}.", FutureWarning, stacklevel=2)
        names = vars(importlib.import_module(new))
        vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})
        vars(module).update({name: names[renamed] for name, renamed in _RENAMED.get(old, {}).items()})


def renamed_keywords(**names: str) -> Callable[[_Function], _Function]:
    """Let a function accept arguments by their old names: `@renamed_keywords(part="split")`."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warnings.warn(f"The argument {old} is now {names[old]}.", FutureWarning, stacklevel=2)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(_Function, call)

    return decorate


def install() -> None:
    """Let Python import modules by their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
