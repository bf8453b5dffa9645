"""A model in a chosen precision, with words for what does not fit the memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from visionattn.errors import InputError, explaining_memory

__all__ = ["PRECISIONS", "Network", "weight_of"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weight_of(model: nn.Module) -> Tensor:
    """A weight, whose device and type are the model's; a number on the CPU for a model without weights."""
    return next(model.parameters(), torch.zeros(()))


class Network:
    """Runs a model on its own device in a chosen precision.

    Args:
        model: Not changed.
        precision: "fp32", "fp16", "bf16", or "auto": fp16 on a GPU, the weights' own type on a CPU. Where the result of
            fp16 or bf16 is not finite, it is computed again with the model's own weights, and a note is left.
        remedy: What to do where the memory ends, for the message.

    Attributes:
        model: The model in evaluation mode.
        device: Its device.
        compute_dtype: What is computed in.
        notes: One for each result that was computed again.

    Raises:
        InputError: There is no such precision.
    """

    def __init__(self, model: nn.Module, precision: str, remedy: str) -> None:
        if precision not in ("auto", *PRECISIONS):
            raise InputError(f"The precision is {precision!r}; there are auto, {', '.join(PRECISIONS)}.")
        if model.training:
            model = copy.deepcopy(model).eval()
        weight = weight_of(model)
        self.device, own = weight.device, weight.dtype
        if precision == "auto":
            chosen = torch.float16 if self.device.type == "cuda" and own == torch.float32 else own
        else:
            chosen = PRECISIONS[precision]
        self.model = model
        self.compute_dtype = chosen
        self.notes: list[str] = []
        self._fast = model if chosen == own else copy.deepcopy(model).to(chosen)
        self._remedy = remedy

    @torch.no_grad()
    def __call__(self, *images: Tensor) -> Tensor:
        """Run the model: floats (B, C, H, W) on the CPU in, the result in their type on the CPU out.

        Raises:
            InputError: The memory does not suffice.
        """
        result = self._compute(self._fast, images)
        if self._fast is not self.model and not result.isfinite().all():
            self.notes.append(f"{self.compute_dtype} overflowed".replace("torch.", ""))
            result = self._compute(self.model, images)
        return result

    def _compute(self, model: nn.Module, images: tuple[Tensor, ...]) -> Tensor:
        weight = weight_of(model)
        height, width = images[0].shape[-2:]
        with explaining_memory(f"{height} x {width} pixels", self._remedy):
            return model(*(image.to(weight.device, weight.dtype) for image in images)).to("cpu", images[0].dtype)
