"""Objectives of heads: the loss, the score on held-out images, and the results on test images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.metrics.targets import average_precision, r2_score
from visionattn.probe.heads.results import Score

__all__ = ["Classification", "MultiLabel", "Objective", "Regression"]

Batches = Iterable[tuple[Tensor, Tensor]]
"""Labels (B, ...) and logits (heads, B, K)."""


class Objective(ABC):
    """Objective of the training of heads."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each head and image: (H, B, K), labels of B images -> (H, B)."""

    @abstractmethod
    def held_out(self, batches: Batches) -> list[float]:
        """Score of each head on the held-out images; higher is better."""

    @abstractmethod
    def scores(self, batches: Batches) -> list[Any]:
        """Results of each head on the test images."""


class Classification(Objective):
    """One class per image: cross-entropy, accuracy, a `Score`."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Objective.losses`."""
        every = labels.expand(len(logits), -1)
        return F.cross_entropy(logits.flatten(0, 1), every.reshape(-1), reduction="none").view_as(every)

    def held_out(self, batches: Batches) -> list[float]:
        """See `Objective.held_out`."""
        correct, images = torch.zeros(1), 0
        for labels, logits in batches:
            right = (logits.argmax(2) == labels).sum(1)
            correct = right if not images else correct + right
            images += len(labels)
        return (correct.double() / images).tolist()

    def scores(self, batches: Batches) -> list[Any]:
        """See `Objective.scores`."""
        parts: list[list[Tensor]] = []
        for labels, logits in batches:
            confidences, predictions = logits.softmax(2).max(2)
            values = [predictions, confidences, predictions == labels, self.losses(logits, labels)]
            parts.append([value.cpu() for value in values])
        joined = [torch.cat(values, dim=1) for values in zip(*parts, strict=True)]
        return [Score(*(value[number] for value in joined)) for number in range(len(joined[0]))]


class _Numbers(Objective):
    """Labels are K numbers per image, (n, K); the results on the test images are outputs (n, K)."""

    def scores(self, batches: Batches) -> list[Any]:
        """See `Objective.scores`."""
        return list(torch.cat([self.outputs(logits).cpu() for _, logits in batches], dim=1))

    @abstractmethod
    def outputs(self, logits: Tensor) -> Tensor:
        """Predictions from logits."""

    def _all(self, batches: Batches) -> tuple[Tensor, Tensor]:
        pairs = [(labels.cpu(), self.outputs(logits).cpu()) for labels, logits in batches]
        return torch.cat([labels for labels, _ in pairs]), torch.cat([outputs for _, outputs in pairs], dim=1)

    def held_out(self, batches: Batches) -> list[float]:
        """See `Objective.held_out`."""
        labels, outputs = self._all(batches)
        ones = torch.ones(1, len(labels), dtype=torch.float64).numpy()
        found = torch.tensor(
            [
                [float(self.metric(one.double().numpy(), truth.double().numpy(), ones)[0]) for one, truth in columns]
                for columns in ([*zip(head.T, labels.T)] for head in outputs)
            ]
        )
        return found.nanmean(1).nan_to_num(0.0).tolist()

    metric: Any  # of predictions (n,), ground truth (n,) and weights (1, n)


class MultiLabel(_Numbers):
    """Any number of classes per image: binary cross-entropy, mean average precision; outputs are logits."""

    metric = staticmethod(average_precision)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Objective.losses`."""
        every = labels.to(logits.dtype).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, every, reduction="none").mean(2)

    def outputs(self, logits: Tensor) -> Tensor:
        """See `_Numbers.outputs`."""
        return logits


class Regression(_Numbers):
    """Numbers per image: squared error of standardised targets, R^2; outputs are in the units of the targets.

    Args:
        mean: Mean of each target over the training images, (K,).
        deviation: Standard deviation of each target over the training images, (K,).
    """

    metric = staticmethod(r2_score)

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean, self.deviation = mean, deviation

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Objective.losses`."""
        wanted = ((labels - self.mean.to(labels.device)) / self.deviation.to(labels.device)).to(logits.dtype)
        return (logits - wanted).square().mean(2)

    def outputs(self, logits: Tensor) -> Tensor:
        """See `_Numbers.outputs`."""
        return logits.double() * self.deviation.to(logits.device) + self.mean.to(logits.device)

    @torch.no_grad()
    def rescale(self, classifier: nn.Linear) -> None:
        """Change a classifier so that its logits are the outputs."""
        mean, deviation = (values.to(classifier.weight) for values in (self.mean, self.deviation))
        classifier.weight.mul_(deviation[:, None])
        classifier.bias.mul_(deviation).add_(mean)
