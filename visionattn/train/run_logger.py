"""A metrics file that a resumed run continues."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

__all__ = ["ResumedLogger"]


class ResumedLogger(CSVLogger):
    """CSVLogger into the folder of an earlier run; Lightning's own would delete its files.

    Args:
        folder: Folder of the run.
        updates: Number of updates in the checkpoint; later log entries are discarded, since they will be logged again.
    """

    def __init__(self, folder: str | Path, updates: int) -> None:
        folder = Path(folder)
        super().__init__(save_dir=str(folder.parent), name="", version=folder.name)
        self._updates = updates

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, initialised with the rows of the earlier run."""
        if self._experiment is None:
            file = Path(self.log_dir) / "metrics.csv"
            rows = []
            if file.exists():
                with file.open(newline="") as lines:
                    rows = [row for row in csv.DictReader(lines) if int(row["step"]) < self._updates]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                writer = super().experiment
            writer.metrics = rows
            writer.save()
        return self._experiment
