"""Any function of images as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visionattn.adapters.base import AdaptedModel
from visionattn.errors import InputError, shorten

__all__ = ["FunctionModel"]


class FunctionModel(AdaptedModel):
    """Any function of images (B, C, H, W) that returns tokens, features or a map (see `visionattn.adapters`).

    Args:
        function: A module, or another callable. The weights of a callable are unknown: its
            output for one image identifies them.
        image_size: Side of the images.
        mean: Mean for normalisation; the default is ImageNet's.
        std: Standard deviation for normalisation; the default is ImageNet's.
        class_token: The first token is a class token.
        registers: Number of tokens after it that are not patches.
        device: Device of the images for a function that is not a module.
        name: Name in reports; the function's own by default.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        *,
        image_size: int,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        class_token: bool = False,
        registers: int = 0,
        device: str | torch.device = "cpu",
        name: str | None = None,
    ) -> None:
        if not callable(function):
            raise InputError(f"A function of images is required; got {shorten(type(function).__name__)}.")
        own = str(getattr(function, "__name__", type(function).__name__))
        super().__init__(name or own, image_size, mean, std, int(class_token) + registers, class_token)
        self.function, self.runs_on = function, None if isinstance(function, nn.Module) else torch.device(device)
        if self.runs_on is not None or next(self.parameters(), None) is None:
            noise = torch.rand(1, len(mean), image_size, image_size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                self.register_buffer("response", self._compute(noise).float())

    def _compute(self, images: Tensor) -> Tensor:
        found = self.function(images if self.runs_on is None else images.to(self.runs_on))
        try:
            return torch.as_tensor(found).to(images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.name} must return a tensor; got {shorten(type(found).__name__)}.") from error

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """See `AdaptedModel.read`."""
        return [self._compute(images)]
