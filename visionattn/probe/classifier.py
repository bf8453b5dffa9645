"""A backbone and a head as one model, for export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionattn.probe.heads.banks import Head, head_tokens
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["ProbedClassifier"]


class ProbedClassifier(nn.Module):
    """A backbone and a head as one model, with a fixed input size.

    Args:
        backbone: Backbone on the CPU that computes in float32.
        position: Index of the head's layer among those that the backbone reads.
        head: Head in evaluation mode.
        classes: Names of the classes.
        mean: Mean of the images' normalisation.
        std: Standard deviation of the images' normalisation.

    Shape:
        Normalised images (B, C, H, W) -> logits (B, K).
    """

    def __init__(
        self,
        backbone: Backbone,
        position: int,
        head: Head,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model: Any = backbone.model
        self.head = head
        self.num_classes = len(classes)
        self._read = backbone
        self._position = position
        cfg = dict(getattr(self.model, "pretrained_cfg", None) or {})
        channels = len(mean)
        self.pretrained_cfg = {
            "architecture": f"{cfg.get('architecture') or type(self.model).__name__} probed",
            "input_size": (channels, *backbone.image_size),
            "fixed_input_size": True,
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "label_names": list(classes),
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        tokens = self._read(images)[self._position]
        return self.head(head_tokens(tokens, self.head.tokens))
