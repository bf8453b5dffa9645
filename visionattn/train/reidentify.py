r"""Re-identification by the common strong recipe (arXiv 1903.07071): one feature t of an image, its identity y.

    b    = BatchNorm(t) without a bias                                                 the "BNNeck"
    loss = cross-entropy(W b, y) + mean over anchors of softplus(d(t, p) - d(t, n))    no margin

with the farthest image p of the same identity in the batch, the nearest n of another, and Euclidean distances d.
Ranking is by the cosine of t, the feature before the neck, as TransReID's (arXiv 2102.04378) is by default.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.checkpoints import create
from visionattn.errors import ConfigError, require
from visionattn.train.retrieve import RankedTask

__all__ = ["ReidentifyTask"]


class ReidentifyTask(RankedTask):
    """A backbone that distinguishes individuals, and its training (equations: see the module).

    Args:
        name: Name of a model in timm's registry; its pooled features are the embedding.
        model_args: Further arguments of the model, such as `img_size` or `checkpoint_path`.
        attributes: The single attribute, the identity -> its values; follows from the data.
        pretrained: Start from the published weights.
        label_smoothing: Fraction of the target that is spread over all identities.
        **optimization: Arguments of `OptimizedTask`.
    """

    def __init__(
        self,
        name: str = "vit_small_patch16_224",
        model_args: dict[str, Any] | None = None,
        attributes: dict[str, list[str]] | None = None,
        pretrained: bool = False,
        label_smoothing: float = 0.0,
        opt: str = "sgd",
        lr: float = 0.008,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 5.0,
        **optimization: Any,
    ) -> None:
        if not attributes or len(attributes) != 1:
            raise ConfigError("Re-identification has one attribute, the identity: set data.attributes to it.")
        model_args = {**(model_args or {}), "num_classes": 0}
        super().__init__(opt=opt, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **optimization)
        self.net = create(name, pretrained=pretrained, **model_args)
        features: Any = self.net.num_features
        identities = len(next(iter(attributes.values())))
        self.neck = nn.BatchNorm1d(features)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(features, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.miner = require("pytorch_metric_learning.miners", "train").BatchHardMiner(
            distance=require("pytorch_metric_learning.distances", "train").LpDistance(normalize_embeddings=False)
        )

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.losses(self.net(batch[0]), batch[1][:, 0])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (B, D) and labels int64 (B,) -> the loss."""
        logits = self.classifier(self.neck(features))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams.label_smoothing)
        anchors, positives, negatives = self.miner(features.detach(), labels)
        if not len(anchors):  # one identity only
            return loss
        near = F.pairwise_distance(features[anchors], features[positives])
        far = F.pairwise_distance(features[anchors], features[negatives])
        return loss + F.softplus(near - far).mean()
