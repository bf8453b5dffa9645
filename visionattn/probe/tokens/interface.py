"""Interface of features: the tokens of images at some layers of a frozen backbone, stored or computed.

Patches, class token and registers are separate; the map (B, D, H, W) of a convolutional network has N = H W patches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Features", "Layer", "Tokens", "dequantize"]


@dataclass(frozen=True)
class Layer:
    """A layer whose outputs are read.

    Attributes:
        name: Displayed name, such as `"blocks.11"` or `"stage 4"`.
        dim: Width D of its tokens.
        grid: Height and width of the grid of patches.
        has_class: Whether there is a class token.
        num_registers: Number of register tokens.
    """

    name: str
    dim: int
    grid: tuple[int, int]
    has_class: bool = False
    num_registers: int = 0


class Tokens(NamedTuple):
    """The tokens of a batch of images at one layer.

    Attributes:
        patches: (B, N, D), row by row of the grid.
        class_token: (B, D); None if the backbone has none.
        registers: (B, R, D); None if the backbone has none.
    """

    patches: torch.Tensor
    class_token: torch.Tensor | None = None
    registers: torch.Tensor | None = None


class Features(ABC):
    """Labelled images as tokens.

    Attributes:
        layers: The layers that are read.
        labels: The class of each image, int64 (n,).
        classes: The names of the classes.
    """

    layers: tuple[Layer, ...]
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batches(self, rows: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, list[Tokens]]]:
        """Iterate over the tokens of some rows, in the given order.

        Args:
            rows: Rows of `labels`, int64 (m,); repeats are allowed.
            batch_size: Images per batch; the last batch has the rest.

        Yields:
            The rows of a batch, and its tokens, one entry per layer.
        """

    def stored_batches(
        self, rows: torch.Tensor, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, list[Tokens], list[Tokens] | None]]:
        """Like `batches`, but in int8 if the tokens are stored in int8: a quarter of the memory of float32.

        Yields:
            The rows of a batch, its tokens, and their scales: None, or for int8 tokens one number per token, as patches
            (B, N), class token (B,) and registers (B, R), with which `dequantize` multiplies them.
        """
        for some, tokens in self.batches(rows, batch_size):
            yield some, tokens, None


def dequantize(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply int8 tokens (..., D) with their scales (...), in the dtype of the scales."""
    return tokens.to(scales.dtype).mul_(scales.unsqueeze(-1))
