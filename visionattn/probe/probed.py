"""A backbone and a head as one model, for export.

| task of the head | `task` | output |
| --- | --- | --- |
| classification | classify | `logits` (B, K) |
| segmentation | segment | `logits` (B, K, H, W) at the size of the images, interpolated bilinearly between tokens |
| multilabel | multilabel | `probabilities` (B, K) |
| regression | regress | `values` (B, K), in the units of the targets |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionattn.probe.heads.banks import Head, head_tokens
from visionattn.probe.segmentation.heads import LinearSegmenter, interpolate
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["ProbedModel"]

_TASKS = {
    "classification": ("classify", "logits"),
    "segmentation": ("segment", "logits"),
    "multilabel": ("multilabel", "probabilities"),
    "regression": ("regress", "values"),
}
"""Task of a head -> task and output name of the model."""


class ProbedModel(nn.Module):
    """A backbone and a head as one model, with a fixed input size.

    Args:
        backbone: Backbone on the CPU that computes in float32 and reads only the head's layer.
        head: Head in evaluation mode.
        classes: Names of the classes, or of the targets of a regression.
        mean: Mean of the images' normalisation.
        std: Standard deviation of the images' normalisation.
        task: "classification", "segmentation", "multilabel" or "regression".

    Shape:
        Normalised images (B, C, H, W) -> output of the task (see the module).
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | LinearSegmenter,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        task: str = "classification",
    ) -> None:
        super().__init__()
        self.model: Any = backbone.model
        self.head = head
        self.num_classes = len(classes)
        self.task, name = _TASKS[task]
        self.output_names = (name,)
        self._read = backbone
        cfg = dict(getattr(self.model, "pretrained_cfg", None) or {})
        self.pretrained_cfg = {
            "architecture": f"{cfg.get('architecture') or type(self.model).__name__} probed",
            "input_size": (len(mean), *backbone.image_size),
            "fixed_input_size": True,
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            # Segmentation takes the whole image.
            "crop_mode": "squash" if self.task == "segment" else "center",
            "label_names": list(classes),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> output of the task."""
        tokens = self._read(images)[0]
        found = self.head(head_tokens(tokens, self.head.tokens))
        if self.task == "segment":
            return interpolate(found, self._read.layers[0].grid, self._read.image_size)
        return found.sigmoid() if self.task == "multilabel" else found
