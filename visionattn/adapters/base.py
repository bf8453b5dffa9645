"""The token interface of timm's models, for networks of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionattn.errors import InputError

__all__ = ["AdaptedModel"]


class AdaptedModel(nn.Module):
    """Base of adapted networks.

    Args:
        name: Name of the network.
        image_size: Side of the images.
        mean: Mean for normalisation, one value per channel.
        std: Standard deviation, likewise.
        num_prefix_tokens: Tokens before the patches, P.
        has_class_token: Whether the first of them is a class token; the others are registers.
    """

    num_classes = 0

    def __init__(
        self,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_prefix_tokens: int = 0,
        has_class_token: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.in_chans = name, len(mean)
        self.num_prefix_tokens, self.has_class_token = num_prefix_tokens, has_class_token
        self.pretrained_cfg = {
            "architecture": name,
            "input_size": (len(mean), image_size, image_size),
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """Outputs of the layers; with `norm`, the last one is the input of the network's own head."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As in timm's models: layers as maps (B, D, H, W), or as tokens (B, N, D) if `output_fmt` is "NLC"."""
        layers = self.read(x, norm)
        chosen = layers if indices is None else [layers[index] for index in indices]
        found = [self._split(layer, x, return_prefix_tokens, output_fmt) for layer in chosen]
        return found if intermediates_only else (None, found)

    def _split(self, layer: Tensor, images: Tensor, with_prefix: bool, output_fmt: str) -> Any:
        if len(layer) != len(images) or layer.ndim not in (2, 3, 4):
            raise InputError(
                f"{self.name} must return (B, D), (B, N, D) or (B, D, H, W) for images "
                f"{tuple(images.shape)}; got {tuple(layer.shape)}."
            )
        layer = layer.unsqueeze(1) if layer.ndim == 2 else layer
        prefix = layer[:, :0] if layer.ndim == 4 else layer[:, : self.num_prefix_tokens]
        patches = layer if layer.ndim == 4 else layer[:, self.num_prefix_tokens :]
        if patches.ndim == 3 and output_fmt == "NCHW":
            patches = patches.transpose(1, 2).unflatten(2, self._grid(patches.shape[1], images))
        elif patches.ndim == 4 and output_fmt == "NLC":
            patches = patches.flatten(2).transpose(1, 2)
        return (patches, prefix) if with_prefix else patches

    def _grid(self, count: int, images: Tensor) -> tuple[int, int]:
        """Height and width of the patch grid, with the aspect ratio of the images."""
        height, width = images.shape[2:]
        rows = round((count * height / width) ** 0.5)
        if count == 0 or rows == 0 or rows * (count // rows) != count or rows * width != count // rows * height:
            raise InputError(
                f"{self.name} returns {count} patch tokens for images of {height} x {width} "
                "pixels, which form no grid of that shape: state how many of its tokens are not patches (class_token, "
                "registers)."
            )
        return rows, count // rows
