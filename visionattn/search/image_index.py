"""An index of a folder of images: what each looks like under each attribute, searched by cosine.

Up to 200,000 images search is exact; see `visionattn.search.nearest` for more.
`visionattn.search.building` makes it, `visionattn.search.files` describes its files.
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

MOST = 1000  # images that are wanted, up to which candidates are looked for

__all__ = ["Hit", "ImageIndex", "build_index", "find_images", "read_upright", "write_index"]


@dataclass(frozen=True)
class Hit:
    """A found image: its name, its score, and its cosine under each attribute that was asked for."""

    image: str
    score: float
    cosines: dict[str, float]

    def __repr__(self) -> str:
        cosines = ", ".join(f"{name} {value:.3f}" for name, value in self.cosines.items())
        return f"Hit({self.image!r}, {self.score:.3f}: {cosines})"


class ImageIndex:
    """An index that `build_index` wrote.

    Args:
        folder: Its folder.

    Attributes:
        manifest: What it says of itself: model, weights, input, conditions, folder, images.
        model: The model that embeds queries, as soon as there was one.
        update: What the `visionattn.index` that gave this index changed.

    Raises:
        DataError: There is none, it is unfinished, damaged, or of another format.
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
        """The attributes to search by."""
        return tuple(self.manifest["conditions"])

    def check(self, model: nn.Module, model_name: str) -> None:
        """Refuse a model that did not make this index.

        Raises:
            CheckpointError: Its weights are others.
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
        """An RGB image -> its vectors float32 (C, E), prepared as the index's images were.

        Raises:
            InputError: The manifest does not say how, or the model cannot embed images of that size.
        """
        check_config(self.manifest["input"])
        parameter = next(model.parameters(), torch.zeros(()))
        tensor = eval_transform(self.manifest["input"])(image)[None].to(parameter.device, parameter.dtype)
        try:
            return embed(model.eval(), tensor)[0].cpu().numpy()
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"The model cannot embed an image as {shorten(self.folder)} prepares it: {shorten(error)}."
            ) from error

    def copies_of(self, path: str | Path) -> list[int]:
        """Positions of the images that are this file, or have the same content.

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
        """The nearest images: all are compared, unless the index has candidates and one attribute is asked for.

        Args:
            vectors: float32 (C, E) of the query, L2-normalised.
            attributes: Weight of each attribute; the score is the weighted mean of their cosines.
            top: Most hits.
            exclude: Positions of images that are no hits (see `copies_of`).

        Returns:
            Best first; equal scores in the order of the images.

        Raises:
            DataError: A file of the index is damaged.
            UnknownNameError: There is no such attribute.
            InputError: A weight is not above 0, or there is none, `top` is below 1, or the vectors are of another shape
                or not finite.
        """
        self.check_attributes(attributes)
        if top < 1:
            raise InputError(f"The number of images to find must be at least 1; got {top}.")
        shape = (len(self.conditions), self.manifest["embed_dim"])
        if vectors.shape != shape or not np.isfinite(vectors).all():
            raise InputError(f"The query must be {shape} finite numbers; got {vectors.shape}.")
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
                # Without a given array it would be torch's where somebody imported faiss.contrib.torch_utils.
                own = index.reconstruct_n(0, index.ntotal, np.empty((index.ntotal, index.d), np.float32))
                every[name] = own @ vectors[self.conditions.index(name)]
            mixed = np.asarray(sum(weight / total * every[name] for name, weight in weights.items()))
            places = np.argsort(-mixed, kind="stable")[:wanted].tolist()
            scores = mixed[places].tolist()
            cosines = {name: {place: float(own[place]) for place in places} for name, own in every.items()}
        # Cosines beyond 1, or faiss's -1 for no image, follow from vectors that nobody checked.
        if any(place < 0 or not abs(score) <= UNIT for place, score in zip(places, scores)):
            raise DataError(f"{shorten(self.folder)} is damaged: a score is not a cosine. Index the images again.")
        left_out = set(exclude)
        return [
            Hit(self.images[place], score, {name: own[place] for name, own in cosines.items()})
            for place, score in zip(places, scores)
            if place not in left_out
        ][:top]

    def check_attributes(self, attributes: Mapping[str, float] | Sequence[str]) -> None:
        """Refuse attributes that the index does not have, and weights that are none.

        Raises:
            UnknownNameError: There is no such attribute.
            InputError: A weight is not above 0, or there is none.
        """
        if unknown := [name for name in attributes if name not in self.conditions]:
            raise UnknownNameError(
                f"The index has no attribute {', '.join(map(shorten, unknown))}. It has {', '.join(self.conditions)}."
            )
        weights = attributes.values() if isinstance(attributes, Mapping) else ()
        if not attributes or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise InputError("Say by which attributes to search; their weights are finite and above 0.")

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
