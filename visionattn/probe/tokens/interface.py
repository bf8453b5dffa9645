"""What probing reads: the tokens of images at some layers of a frozen backbone, however they are had.

Patches, class token and registers are kept apart; a convolutional network's map (B, D, H, W) gives N = H W patches.
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
        name: As it is shown, such as `"blocks.11"` or `"stage 4"`.
        dim: Width D of its tokens.
        grid: Height and width of the patches.
        has_class: Whether there is a class token.
        num_registers: Register tokens.
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
        class_token: (B, D), None where the backbone has none.
        registers: (B, R, D), None where it has none.
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
        """Give the images of some rows, in that order.

        Args:
            rows: Rows of `labels`, int64 (m,); repeats are allowed.
            batch_size: Images at once; the last batch has the rest.

        Yields:
            The rows of a batch, and its tokens, one entry a layer.
        """

    def stored_batches(
        self, rows: torch.Tensor, batch_size: int
    ) -> Iterator[tuple[torch.Tensor, list[Tokens], list[Tokens] | None]]:
        """Give what `batches` gives, in int8 where it is stored so: a quarter of float32's memory.

        Yields:
            The rows of a batch, its tokens, and their scales: None, or for int8 tokens a number each, as patches
            (B, N), class token (B,) and registers (B, R), that `dequantize` multiplies them with.
        """
        for some, tokens in self.batches(rows, batch_size):
            yield some, tokens, None


def dequantize(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Tokens (..., D) in int8 times their scales (...), in the dtype of these."""
    return tokens.to(scales.dtype).mul_(scales.unsqueeze(-1))
