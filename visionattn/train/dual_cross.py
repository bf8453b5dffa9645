r"""Training a DCAL classifier: a loss on each of its three branches, summed with learned weights.

With the logits of self-attention, global-local and pair-wise cross-attention, targets y, and scalars w that are learned
from 0 and are not part of the network:

    L_i  = cross-entropy(logits_i, y)                        i in {sa, glca, pwca}
    loss = sum over i of (exp(-w_i) L_i + w_i) / 2

Pair-wise cross-attention pairs each image with the previous one in the batch, so batches must be shuffled; it shares
the weights of self-attention, and is removed after training.

Source: DCAL, arXiv 2205.02151; the loss weights, arXiv 1705.07115.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from visionattn.blocks.dual_cross import UncertaintyWeighting
from visionattn.errors import ConfigError
from visionattn.models.dcal import DualCrossBranches, DualCrossTransformer
from visionattn.train.classify import ClassifyTask

__all__ = ["DualCrossTask"]


class DualCrossTask(ClassifyTask):
    """A DCAL classifier and its training (equations: see the module).

    Args:
        name: Name of the model in timm's registry, one of `va_dcal_*`.
        settings: Arguments of `ClassifyTask`, except layer_decay; `compile` compiles evaluation only.

    Raises:
        ConfigError: The model is not a DCAL network, or is built with `sa_only`.
    """

    net: Any

    def __init__(self, name: str = "va_dcal_nano_patch4_32", **settings: Any) -> None:
        super().__init__(name, **settings)
        if not isinstance(self.net, DualCrossTransformer) or self.net.sa_only:
            raise ConfigError(f"DualCrossTask needs a va_dcal_* model with three branches; {name!r} has one.")
        if self.hparams.layer_decay is not None:
            raise ConfigError("DualCrossTask uses one learning rate for all layers: remove model.layer_decay.")
        self.weighting = UncertaintyWeighting(len(DualCrossBranches._fields))

    @property
    def trained(self) -> nn.Module:
        """The network and its loss weights."""
        return self

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay in timm's optimizers: those that the network exempts."""
        return {f"net.{name}" for name in self.net.no_weight_decay()}

    def losses(self, images: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> DualCrossBranches:
        """Images (B, C, H, W) and labels (B,) or probabilities (B, num_classes) -> the loss of each branch, ()."""
        logits = self.net.branch_logits(self.net.forward_branches(images))
        return DualCrossBranches(*(F.cross_entropy(x, targets, label_smoothing=label_smoothing) for x in logits))

    def training_loss(self, images: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Images (B, C, H, W) and labels (B,) or probabilities (B, num_classes) -> the weighted sum, ()."""
        losses = self.losses(images, targets, label_smoothing)
        self.log_dict({f"train/loss_{name}": loss for name, loss in losses._asdict().items()})
        return self.weighting(torch.stack(losses))
