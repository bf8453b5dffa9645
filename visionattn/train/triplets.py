r"""Training retrieval on triplets: under a condition c, an image `near` is closer to the anchor than an image `far`.

    d_c(x, y) = 1 - cos(f_c(x), f_c(y))                                                in the space of condition c
    loss      = mean over triplets of  max(0, d_c(anchor, near) - d_c(anchor, far) + m)

This is the loss of conditional similarity networks (arXiv 1603.07810), with cosine distance; computed by torch. The
metric is the fraction of triplets with d_c(anchor, near) < d_c(anchor, far), for each condition, and its mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.data.retrieval.catalogue_files import Triplets
from visionattn.errors import ConfigError
from visionattn.metrics.ranking import score_triplets
from visionattn.train.retrieve import BEGINNING, EmbeddingTask, create_conditional

__all__ = ["TripletTask"]


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unit vectors (B, E) -> 1 - cos (B,)."""
    return 1 - (x * y).sum(dim=-1)


class TripletTask(EmbeddingTask):
    """A model that embeds images by conditions, and its training on triplets (equations: see the module).

    Args:
        name: Name in timm's registry of a model that takes `attributes` and returns (B, C, E), such as
            `va_cca_vit_tiny_patch16_224`, or `va_cca` with any `backbone` in `model_args`.
        model_args: Further arguments of the model, such as `embed_dim`, `head` and `backbone_checkpoint`.
        attributes: Each condition, without values; follows from the data.
        pretrained: Start from the published weights.
        margin: m.
        **optimization: Arguments of `OptimizedTask`.

    Raises:
        ConfigError: There are no conditions, the model does not embed by them, or the margin is not above 0.
    """

    monitor = "val/triplet_accuracy"

    def __init__(
        self,
        name: str,
        model_args: dict[str, Any] | None = None,
        attributes: dict[str, list[str]] | None = None,
        pretrained: bool = False,
        margin: float = 0.2,
        **optimization: Any,
    ) -> None:
        if not attributes:
            raise ConfigError("Triplets need conditions to embed by: they follow from TripletData.")
        if margin <= 0:
            raise ConfigError(f"model.margin must be above 0, to keep embeddings from collapsing; got {margin}.")
        settings = {**(model_args or {}), "attributes": list(attributes)}
        # `visionattn.load` reads here how to build the network, without the initial weights.
        model_args = {key: value for key, value in settings.items() if key not in BEGINNING}
        super().__init__(**optimization)
        self.net = create_conditional(name, pretrained, settings)
        self.loss = nn.TripletMarginWithDistanceLoss(distance_function=cosine_distance, margin=margin)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch: images (3 B, 3, H, W), anchor, far and near in turn, and conditions int64 (B,)."""
        images, conditions = batch
        # All conditions are embedded, so that each parameter has a gradient, as DDP requires.
        spaces = self(images).unflatten(0, (len(conditions), 3))  # (B, 3, C, E)
        anchors, far, near = spaces[torch.arange(len(conditions)), :, conditions].unbind(dim=1)  # (B, E)
        loss = self.loss(anchors, near, far)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def judge(self, name: str, embeddings: Tensor, part: Triplets) -> None:
        """Log the fraction of correctly ordered triplets, by condition and on average."""
        if not len(part.anchors):  # Lightning's sanity check with a few batches
            return
        shares = score_triplets(embeddings, part)
        del shares["all"]
        for condition, share in shares.items():
            self.log(f"{name}/triplet_accuracy_{condition}", share)
        self.log(f"{name}/triplet_accuracy", sum(shares.values()) / len(shares), prog_bar=True)
