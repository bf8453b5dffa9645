"""Re-ranking of the nearest images with a pair encoder, which compares their patches with those of the query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visionattn import weights
from visionattn.blocks.rerank import HEAD_WIDTH, PairEncoder
from visionattn.data.retrieval.embedding import eval_transform
from visionattn.data.retrieval.patches import read_patches
from visionattn.errors import CheckpointError, DataError, InputError, VisionAttnError, shorten
from visionattn.search.building import read_upright
from visionattn.search.image_index import Hit, ImageIndex
from visionattn.weights.hashing import hash_state

__all__ = ["RERANKED", "Reranker"]

RERANKED = 50  # nearest images that are re-ranked
BATCH = 25
DEEPEST = 64  # most blocks of an accepted pair encoder


class Reranker:
    """A pair encoder that re-ranks search results by the patches of a backbone.

    Args:
        path: Checkpoint of `RerankTask`.

    Attributes:
        encoder: The pair encoder, in evaluation mode.
        backbone: Hash of the backbone's weights.

    Raises:
        CheckpointError: The file cannot be read, or contains no pair encoder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content: Any = weights.read(self.path)
        found = content.get("state_dict", content)
        items = found.items() if isinstance(found, dict) else ()
        state = {key: value for key, value in items if isinstance(value, Tensor)}
        parts = {
            part: {key.removeprefix(part): value for key, value in state.items() if str(key).startswith(part)}
            for part in ("pair_encoder.", "base.")
        }
        if not all(parts.values()):
            raise CheckpointError(
                f"{shorten(self.path)} holds no pair encoder: a checkpoint of RerankTask is required to re-rank."
            )
        self.encoder = _build(self.path, parts["pair_encoder."])
        self.backbone = hash_state(parts["base."])

    def check(self, index: ImageIndex, top: int) -> None:
        """Check that an index was made with the backbone and has one attribute, and that `top` is at most 50.

        Raises:
            CheckpointError: The index was made with other weights.
            InputError: The index has several attributes, or `top` is above 50.
        """
        if top > RERANKED:
            raise InputError(
                f"With re-ranking, the number of images to find must be at most {RERANKED}; got {top}. Ask for fewer, "
                "or search without re-ranking."
            )
        if len(index.conditions) > 1:
            raise InputError(
                f"{shorten(index.folder)} has {len(index.conditions)} attributes; re-ranking requires an index with "
                "one attribute."
            )
        if index.manifest["weights"] != self.backbone:
            raise CheckpointError(
                f"{shorten(self.path)} was trained with the model weights {self.backbone[:12]}; "
                f"{shorten(index.folder)} was made with {index.manifest['weights'][:12]}. Index the images with the "
                "model that the pair encoder was trained with."
            )

    @torch.inference_mode()
    def rerank(
        self, index: ImageIndex, model: nn.Module, query: Image.Image, hits: list[Hit], folder: Path
    ) -> tuple[list[Hit], list[str]]:
        """Sort hits by the pair encoder's score, from 0 to 1; hits of equal score keep their order.

        Args:
            index: Index that the hits are from; it defines the preprocessing.
            model: The model that made the index.
            query: Query image, RGB.
            hits: Hits, nearest first.
            folder: Folder of the images.

        Returns:
            The sorted hits with their new scores, and the images that could not be read and are left out.

        Raises:
            DataError: None of the images could be read.
            InputError: The model gives no patches.
        """
        kept, unreadable, patches = [], [], []
        for start in range(0, len(hits), BATCH):
            images = []
            for hit in hits[start : start + BATCH]:
                try:
                    images.append(read_upright(folder / hit.image))
                    kept.append(hit)
                except (OSError, VisionAttnError):
                    unreadable.append(hit.image)
            if images:
                patches.append(self._patches(index, model, images))
        if hits and not kept:
            raise DataError(
                f"None of the {len(hits)} nearest images can be read in {shorten(folder)}, so they cannot be "
                "re-ranked. Give the folder of the images with --images."
            )
        if not hits:
            return [], []
        found = torch.cat(patches)
        own = self._patches(index, model, [query]).expand(len(found), -1, -1)
        scores = self.encoder.to(found.device).compare(own, found).sigmoid().tolist()
        ranked = sorted(zip(kept, scores), key=lambda pair: -pair[1])
        return [Hit(hit.image, score, hit.cosines) for hit, score in ranked], unreadable

    def _patches(self, index: ImageIndex, model: nn.Module, images: list[Image.Image]) -> Tensor:
        parameter = next(model.parameters(), torch.zeros(()))
        prepare = eval_transform(index.manifest["input"])
        batch = torch.stack([prepare(image) for image in images]).to(parameter.device, parameter.dtype)
        found = read_patches(model.eval(), batch)
        if found.shape[-1] != len(self.encoder.mean):
            raise CheckpointError(
                f"{shorten(self.path)} compares patches with {len(self.encoder.mean)} channels; the model's patches "
                f"have {found.shape[-1]}."
            )
        return found


def _build(path: Path, state: dict[str, Tensor]) -> PairEncoder:
    """Build a pair encoder whose sizes follow from its weights, which are checked."""
    embed = state.get("embed.weight", torch.empty(0))
    if embed.ndim != 2 or len(embed) % HEAD_WIDTH or not embed.numel():
        raise CheckpointError(f"{shorten(path)} is damaged: its pair encoder has no weights of a known form.")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if depth > DEEPEST:
        raise CheckpointError(
            f"{shorten(path)} is damaged: its pair encoder has {depth} blocks; the maximum is {DEEPEST}."
        )
    with torch.device("meta"):
        outline = PairEncoder(embed.shape[1], len(embed), depth)
    if wrong := weights.mismatches(state, outline.state_dict()):
        raise CheckpointError(f"{shorten(path)} is damaged: its pair encoder has {weights.name_some(wrong)}.")
    weights.check_values(state, outline.state_dict(), path)
    encoder = outline.to_empty(device="cpu")
    encoder.load_state_dict(state)
    return encoder.float().eval()
