"""Re-ranking the nearest images of a search by a pair encoder that compares their patches with the query's."""

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

RERANKED = 50  # nearest images that are compared again
BATCH = 25
DEEPEST = 64  # blocks of a pair encoder that is read


class Reranker:
    """A pair encoder, and the backbone whose patches it reads.

    Args:
        path: Checkpoint of `RerankTask`.

    Attributes:
        encoder: The pair encoder, in evaluation mode.
        backbone: Hash of the backbone's weights.

    Raises:
        CheckpointError: The file cannot be read, or holds no pair encoder.
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
        """Refuse an index that is not of the backbone, or is searched by attributes, and more images than are compared.

        Raises:
            CheckpointError: The index is of other weights.
            InputError: The index has several attributes, or `top` is above 50.
        """
        if top > RERANKED:
            raise InputError(
                f"The {RERANKED} nearest images are re-ranked; got {top} to find. Ask for fewer, or search without "
                "re-ranking."
            )
        if len(index.conditions) > 1:
            raise InputError(
                f"{shorten(index.folder)} is searched by {len(index.conditions)} attributes; only an index of one is "
                "re-ranked."
            )
        if index.manifest["weights"] != self.backbone:
            raise CheckpointError(
                f"{shorten(self.path)} re-ranks by patches of a model with the weights {self.backbone[:12]}; "
                f"{shorten(index.folder)} was made with {index.manifest['weights'][:12]}. Index the images by the "
                "model that the pair encoder was trained with."
            )

    @torch.inference_mode()
    def rerank(
        self, index: ImageIndex, model: nn.Module, query: Image.Image, hits: list[Hit], folder: Path
    ) -> tuple[list[Hit], list[str]]:
        """The hits in the pair encoder's order, their scores its own, from 0 to 1; equal ones stay in order.

        Args:
            index: Where the hits are from; it says how images are prepared.
            model: The model that made it.
            query: The query image, RGB.
            hits: Nearest first.
            folder: Where the images are.

        Returns:
            The hits, and the images that could not be read and are left out.

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
                f"None of the {len(hits)} nearest images can be read in {shorten(folder)}, so they are not re-ranked. "
                "Say where the images are now by --images."
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
                f"{shorten(self.path)} compares patches of {len(self.encoder.mean)} channels; the model gives "
                f"{found.shape[-1]}."
            )
        return found


def _build(path: Path, state: dict[str, Tensor]) -> PairEncoder:
    """A pair encoder of the sizes of its weights, which are checked."""
    embed = state.get("embed.weight", torch.empty(0))
    if embed.ndim != 2 or len(embed) % HEAD_WIDTH or not embed.numel():
        raise CheckpointError(f"{shorten(path)} is damaged: its pair encoder has no weights of a known form.")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if depth > DEEPEST:
        raise CheckpointError(f"{shorten(path)} is damaged: its pair encoder has {depth} blocks, beyond {DEEPEST}.")
    with torch.device("meta"):
        outline = PairEncoder(embed.shape[1], len(embed), depth)
    if wrong := weights.mismatches(state, outline.state_dict()):
        raise CheckpointError(f"{shorten(path)} is damaged: its pair encoder has {weights.name_some(wrong)}.")
    weights.check_values(state, outline.state_dict(), shorten(path))
    encoder = outline.to_empty(device="cpu")
    encoder.load_state_dict(state)
    return encoder.float().eval()
