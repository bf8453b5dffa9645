"""Throughput in images per second, data loading included."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback

__all__ = ["ImagesPerSecond"]


class ImagesPerSecond(Callback):
    """Logs `train/images_per_second` each epoch, without validation, and `test/images_per_second`.

    The first element of a batch holds its images; the images of all ranks are summed.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def _count(self, trainer: Any, batch: Any, last: bool) -> None:
        if last and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._images += len(batch[0]) * trainer.world_size
        self._seconds, self._since = self._seconds + now - self._since, now

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the timer."""
        self._restart()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self._count(trainer, batch, trainer.is_last_batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Exclude the validation."""
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        if self._images:
            pl_module.log("train/images_per_second", self._images / self._seconds, rank_zero_only=True)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the timer."""
        self._restart()

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a batch."""
        self._count(trainer, batch, batch_idx + 1 == trainer.num_test_batches[0])

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log."""
        if self._images:
            pl_module.log("test/images_per_second", self._images / self._seconds, rank_zero_only=True)
