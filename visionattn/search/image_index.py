"""An index of a folder of images: one embedding per image and attribute, searched by cosine similarity.

Search is exact below 200,000 images; see `visionattn.search.nearest` for more. `visionattn.search.building` builds an
index, `visionattn.search.files` describes its files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from visionattn.data.retrieval.embedding import check_config, embed, eval_transform
from visionattn.errors import CheckpointError, DataError, InputError, UnknownNameError, require, shorten
from visionattn.search.building import Update, build_index, digest_of, find_images, read_upright, write_index
from visionattn.search.files import UNIT, read_manifest, read_vectors
from visionattn.search.nearest import Candidates, find_candidates, open_candidates
from visionattn.weights.hashing import hash_state

MOST = 1000  # candidates are used up to this number of hits

__all__ = ["Hit", "ImageIndex", "build_index", "find_images", "read_upright", "write_index"]


@dataclass(frozen=True)
class Hit:
    """A found image: its name, its score, and its cosine similarity under each attribute of the search."""

    image: str
    score: float
    cosines: dict[str, float]

    def __repr__(self) -> str:
        cosines = ", ".join(f"{name} {value:.3f}" for name, value in self.cosines.items())
        return f"Hit({self.image!r}, {self.score:.3f}: {cosines})"


class ImageIndex:
    """An image index that `build_index` wrote.

    Args:
        folder: Folder of the index.

    Attributes:
        manifest: Description of the index: model, weights, input, conditions, folder, images.
        model: The model that embeds queries; None until a search has opened it.
        update: Changes that the call of `visionattn.index` made that returned this index; otherwise None.

    Raises:
        DataError: There is no index, or it is unfinished, damaged, or of another format.
        MissingPackageError: faiss is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self._faiss: Any = require("faiss", "search")
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.model: nn.Module | None = None
        self.update: Update | None = None
        self._opened: dict[str, Any] = {}
        self._candidates: dict[str, Candidates | None] = {}
        self._vectors: dict[str, np.ndarray] = {}

    def __repr__(self) -> str:
        return f"ImageIndex({str(self.folder)!r}: {len(self.images)} images, attributes {', '.join(self.conditions)})"

    @cached_property
    def images(self) -> list[str]:
        """Name of each image, relative to the folder that was indexed."""
        return list(self.manifest["images"])

    @property
    def conditions(self) -> tuple[str, ...]:
        """Attributes of the index."""
        return tuple(self.manifest["conditions"])

    def check(self, model: nn.Module, model_name: str) -> None:
        """Check that a model made this index.

        Raises:
            CheckpointError: Its weights differ.
        """
        found = hash_state(model.state_dict())
        if found != self.manifest["weights"]:
            raise CheckpointError(
                f"{shorten(self.folder)} was made by {shorten(self.manifest['model'])} with the weights "
                f"{self.manifest['weights'][:12]}; {shorten(model_name)} has {found[:12]}. Give the model that made "
                "it, or index the images again."
            )

    @torch.inference_mode()
    def embed(self, model: nn.Module, image: Image.Image) -> np.ndarray:
        """Embed an RGB image with the preprocessing of the index; returns float32 (C, E).

        Raises:
            InputError: The manifest lacks the preprocessing, or the model cannot embed images of that size.
        """
        check_config(self.manifest["input"])
        parameter = next(model.parameters(), torch.zeros(()))
        tensor = eval_transform(self.manifest["input"])(image)[None].to(parameter.device, parameter.dtype)
        try:
            return embed(model.eval(), tensor)[0].cpu().numpy()
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"The model cannot embed images with the preprocessing of {shorten(self.folder)}: {shorten(error)}."
            ) from error

    def copies_of(self, path: str | Path) -> list[int]:
        """Positions of the indexed images that are this file or have the same content.

        Raises:
            OSError: The file cannot be read.
        """
        path, folder = Path(path), Path(self.manifest["folder"])
        digest, size = digest_of(path), path.stat().st_size
        own = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
        sizes = {name: size for name, size, _ in self.manifest.get("files", [])}
        digests = self.manifest.get("digests", [None] * len(self.images))
        found = []
        for position, (name, known) in enumerate(zip(self.images, digests)):
            if known is None and sizes.get(name, size) == size and (folder / name).is_file():
                known = digest_of(folder / name)
            if known == digest or name == own:
                found.append(position)
        return found

    def search(
        self, vectors: np.ndarray, attributes: Mapping[str, float], top: int, exclude: Collection[int] = ()
    ) -> list[Hit]:
        """Find the nearest images, exactly unless the index has candidates and one attribute is searched.

        Args:
            vectors: Query, float32 (C, E), L2-normalised.
            attributes: Weight of each attribute; the score is the weighted mean of their cosines.
            top: Maximum number of hits.
            exclude: Positions of images to leave out (see `copies_of`).

        Returns:
            Hits, best first; hits of equal score in the order of the index.

        Raises:
            DataError: A file of the index is damaged.
            UnknownNameError: There is no such attribute.
            InputError: No attribute is given, a weight is not above 0, `top` is below 1, or the vectors have another
                shape or are not finite.
        """
        self.check_attributes(attributes)
        if top < 1:
            raise InputError(f"The number of images to find must be at least 1; got {top}.")
        shape = (len(self.conditions), self.manifest["embed_dim"])
        if vectors.shape != shape or not np.isfinite(vectors).all():
            raise InputError(f"The query must have the shape {shape} and finite values; got {vectors.shape}.")
        wanted = min(top + len(exclude), len(self.images))
        heaviest = max(attributes.values())
        weights = {name: weight / heaviest for name, weight in attributes.items()}
        total = sum(weights.values())
        if len(attributes) == 1:
            ((name, _),) = attributes.items()
            places, scores = self._nearest(name, vectors[self.conditions.index(name)], wanted)
            cosines = {name: dict(zip(places, scores))}
        else:
            every = {}
            for name in attributes:
                index = self._index(name)
                # Without an array to fill, it returns a tensor once faiss.contrib.torch_utils is imported.
                own = index.reconstruct_n(0, index.ntotal, np.empty((index.ntotal, index.d), np.float32))
                every[name] = own @ vectors[self.conditions.index(name)]
            mixed = np.asarray(sum(weight / total * every[name] for name, weight in weights.items()))
            places = np.argsort(-mixed, kind="stable")[:wanted].tolist()
            scores = mixed[places].tolist()
            cosines = {name: {place: float(own[place]) for place in places} for name, own in every.items()}
        # Cosines beyond 1, or faiss's position -1 for no image, come from invalid vectors.
        if any(place < 0 or not abs(score) <= UNIT for place, score in zip(places, scores)):
            raise DataError(f"{shorten(self.folder)} is damaged: a score is not a cosine. Index the images again.")
        left_out = set(exclude)
        return [
            Hit(self.images[place], score, {name: own[place] for name, own in cosines.items()})
            for place, score in zip(places, scores)
            if place not in left_out
        ][:top]

    def check_attributes(self, attributes: Mapping[str, float] | Sequence[str]) -> None:
        """Check that the index has all attributes, and that their weights are valid.

        Raises:
            UnknownNameError: There is no such attribute.
            InputError: No attribute is given, or a weight is not finite and above 0.
        """
        if unknown := [name for name in attributes if name not in self.conditions]:
            raise UnknownNameError(
                f"The index has no attribute {', '.join(map(shorten, unknown))}. It has {', '.join(self.conditions)}."
            )
        weights = attributes.values() if isinstance(attributes, Mapping) else ()
        if not attributes or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise InputError("Give at least one attribute to search by, with weights that are finite and above 0.")

    def _nearest(self, name: str, query: np.ndarray, wanted: int) -> tuple[list[int], list[float]]:
        """Positions and cosines of the nearest images under an attribute, best first."""
        number = self.conditions.index(name)
        if name not in self._candidates:
            self._candidates[name] = open_candidates(self.folder, self.manifest, number)
        candidates = self._candidates[name]
        if candidates is not None and wanted <= MOST:
            if name not in self._vectors:
                self._vectors[name] = read_vectors(self.folder, self.manifest, number)
            found = find_candidates(candidates, query, self._vectors[name], wanted)
            if len(found) == wanted:
                return found.tolist(), (self._vectors[name][found] @ query).tolist()
        scores, places = self._index(name).search(query[None], wanted)
        return places[0].tolist(), scores[0].tolist()

    def _index(self, name: str) -> Any:
        if name not in self._opened:
            index = self._faiss.IndexFlatIP(self.manifest["embed_dim"])
            index.add(read_vectors(self.folder, self.manifest, self.conditions.index(name)))
            self._opened[name] = index
        return self._opened[name]
