"""Tokens that a frozen backbone computes in each pass, without storing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.errors import DataError, InputError, shorten
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Features, Tokens
from visionattn.probe.tokens.loading import read_batches

__all__ = ["LiveFeatures", "split_rows"]


class LiveFeatures(Features):
    """Tokens that the backbone computes in each pass, returned as float32 on its device.

    Args:
        backbone: Backbone that computes the tokens.
        dataset: Map-style data set of (normalised float image (C, H, W), int label), without random augmentation.
        labels: Class of each image, int64 (n,).
        classes: Names of the classes.
        num_workers: Loading processes.
        names: Names of the images in messages; None: their rows.

    Raises:
        InputError: The numbers of labels and images differ.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: Any,
        labels: Tensor,
        classes: Sequence[str],
        num_workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        if len(labels) != len(dataset):
            raise InputError(f"There are {len(labels)} labels for {len(dataset)} images.")
        self.backbone = backbone
        self.dataset = dataset
        self.layers = backbone.layers
        self.labels = labels
        self.classes = tuple(classes)
        self.num_workers = num_workers
        self.names = names

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`; each batch is one forward pass.

        Raises:
            InputError: A row does not exist, or images do not have the backbone's size.
            DataError: An image cannot be read, or its tokens are NaN or infinite.
        """
        split = split_rows(rows, batch_size, len(self))
        loaded = read_batches(
            self.dataset, self.backbone.image_size, [some.tolist() for some in split], self.num_workers
        )
        for some, batch in zip(split, loaded):
            if batch.skipped:
                row, reason = batch.skipped[0]
                raise DataError(
                    f"Image {self._name(row)} cannot be read: {reason} Use only the images that find_readable() "
                    "returns."
                )
            assert batch.images is not None
            tokens = [
                Tokens._make(None if part is None else part.float() for part in found)
                for found in self.backbone(batch.images)
            ]
            for layer, found in zip(self.layers, tokens):
                parts = [part.flatten(1).isfinite().all(1).cpu() for part in found if part is not None]
                sound = torch.stack(parts).all(0)
                if not sound.all():
                    broken = [self._name(row) for row in some[~sound].tolist()]
                    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
                    raise DataError(
                        f"Tokens of layer {layer.name} contain NaN or infinity. Check the backbone's weights, and "
                        f"compute without autocast or in bfloat16. Affected images: "
                        f"{', '.join(broken[:5])}{more}."
                    )
            yield some, tokens

    def _name(self, row: int) -> str:
        return str(row) if self.names is None else shorten(self.names[row])


def split_rows(rows: Tensor, batch_size: int, count: int) -> tuple[Tensor, ...]:
    """Split rows into batches, after a check that they exist."""
    if len(rows) == 0:
        return ()
    low, high = rows.min().item(), rows.max().item()
    if low < 0 or high >= count:
        raise InputError(f"rows must be from 0 to {count - 1}; got {low} to {high}.")
    return rows.split(batch_size)
