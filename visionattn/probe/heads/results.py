"""Results of a sweep: the heads, their scores on the test images, and the table of them."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from visionattn.probe.heads.banks import Head, HeadSpec
from visionattn.probe.statistics import Interval, calibration_error, wilson_interval

__all__ = ["HeadResult", "Score", "SweepResult"]


@dataclass(frozen=True)
class Score:
    """Predictions of a head for the test images.

    Attributes:
        predictions: Predicted class of each image, int64 (n,).
        confidences: Probability of the predicted class, (n,).
        correct: Whether the prediction is correct, bool (n,).
        nll: Negative log-likelihood of each image's true class, in nats, (n,).
    """

    predictions: torch.Tensor
    confidences: torch.Tensor
    correct: torch.Tensor
    nll: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images with a correct prediction."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, 15 bins."""
        return calibration_error(self.confidences, self.correct)


@dataclass(frozen=True)
class HeadResult:
    """A head after its training.

    Attributes:
        spec: Settings of the head.
        layer: Name of its layer.
        head: The head with the weights of its best epoch, on the CPU, in evaluation mode.
        held_out: Accuracy on the held-out images after each epoch; empty if none are held out.
        best_epoch: First epoch with the highest of these accuracies, counted from 1; the last epoch if none are held
            out, 0 if the head diverged in the first epoch.
        last: Score on the test images after the last epoch; None for a head that diverged.
        best: Score on the test images after the best epoch; None for a head without one.
        diverged: Epoch in which its loss became infinite or NaN; 0 if it never did. The best epoch of such a head is an
            earlier one, and the head is not selected.
        refit: Whether it was also trained on the held-out images.
    """

    spec: HeadSpec
    layer: str
    head: Head
    held_out: list[float]
    best_epoch: int
    last: Score | None
    best: Score | None
    diverged: int
    refit: bool = False

    @property
    def held_out_accuracy(self) -> float:
        """Accuracy on the held-out images after the best epoch; NaN if there is none."""
        return self.held_out[self.best_epoch - 1] if self.held_out and self.best_epoch else math.nan


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        heads: The heads in the requested order.
        chosen: For each pooling and layer, the head with the highest held-out accuracy (ties: the first); with `refit`,
            trained again on all training images.
        epochs: Number of training epochs.
        seconds: Wall time of the sweep for all heads, including token reads, excluding time between interruption and
            resume.
        notes: Notes for the reader of the table, such as classes without test images.
    """

    heads: list[HeadResult]
    chosen: list[HeadResult]
    epochs: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table, one row per head, then those that were trained again; missing numbers are NaN."""
        chosen = {id(result) for result in self.chosen}
        again = [result for result in self.chosen if result.refit]
        selected = {(result.spec, result.layer) for result in again}
        rows = []
        for result in self.heads + again:
            pooling = sum(p.numel() for p in result.head.pooling.parameters())
            row = {
                **asdict(result.spec),
                "layer": result.layer,
                "refit": result.refit,
                "chosen": id(result) in chosen or (result.spec, result.layer) in selected,
                "pooling_parameters": pooling,
                "classifier_parameters": sum(p.numel() for p in result.head.parameters()) - pooling,
                "epochs": self.epochs,
                "best_epoch": result.best_epoch,
                "diverged": result.diverged,
                "held_out_accuracy": result.held_out_accuracy,
            }
            for name, score in {"last": result.last, "best": result.best}.items():
                low, high = score.interval if score else (math.nan, math.nan)
                row[f"test_{name}"] = score.accuracy if score else math.nan
                row[f"test_{name}_low"], row[f"test_{name}_high"] = low, high
            row["calibration_error"] = result.best.calibration_error if result.best else math.nan
            row["nll"] = float(result.best.nll.mean()) if result.best else math.nan
            row["sweep_seconds"] = self.seconds
            rows.append(row)
        return rows
