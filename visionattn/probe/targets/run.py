"""Run of a probe for multi-label classification or regression, from the tokens to the report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Subset

from visionattn.metrics.targets import average_precision, draws, mean_absolute_error, r2_score, spearman
from visionattn.opening import Opened
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.heads.objectives import MultiLabel, Objective, Regression
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.heads.training import HeadTraining
from visionattn.probe.pixels import read_pixels
from visionattn.probe.progress import show_progress
from visionattn.probe.reading import TokenReader
from visionattn.probe.report.tasks import Difference, Metric, TaskHead, TaskReport
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.statistics import Interval
from visionattn.probe.targets.images import TargetImages
from visionattn.probe.task_run import HOLDOUT, WARMUP, TaskRun, divide
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Features

__all__ = ["TargetRun"]

# A function of predictions (n,), ground truth (n,) and weights of draws (R, n).
Function = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
MULTILABEL: dict[Metric, Function] = {Metric("average_precision", "mAP"): average_precision}
REGRESSION: dict[Metric, Function] = {
    Metric("r2", "R²", share=False): r2_score,
    Metric("mae", "MAE", share=False): mean_absolute_error,
    Metric("spearman", "Spearman", share=False): spearman,
}
WORDS = (
    "The best head of each pooling and layer by the held-out images, on which its epoch was selected too. {measured} "
    "Brackets are 95 % intervals, bootstrapped over test images. Pixels are a baseline without a backbone: each image "
    "averaged to 16 x 16 pixels, and a linear head."
)
MEASURED = {
    "multilabel": "mAP is the mean over classes of the average precision.",
    "regression": "Each metric is the mean over targets; MAE is in their units.",
}


class TargetRun(TaskRun):
    """A run, part by part."""

    def __init__(
        self,
        settings: ProbeSettings,
        name: str,
        opened: Opened,
        backbone: Backbone,
        images: TargetImages,
        console: Console,
    ) -> None:
        super().__init__(settings, name, opened, backbone, images, console)
        self.specs, self.left_out = settings.specs(backbone.layers, len(images.classes))
        self.functions = MULTILABEL if settings.task == "multilabel" else REGRESSION
        self.metrics = tuple(self.functions)
        one = [metric._replace(name="average precision") if metric.name == "mAP" else metric for metric in self.metrics]
        self.class_metrics = tuple(one)
        self.words = WORDS.format(measured=MEASURED[settings.task])

    def report(self, command: str | None = None) -> TaskReport:
        """See `TaskRun.report`."""
        settings, images, seconds = self.settings, self.images, {}
        start = time.perf_counter()
        tokens = TokenReader(settings, self.name, self.backbone, images, self.console)
        train, test = tokens.read()
        for part, values, rows in zip((train, test), images.values, tokens.readable):
            part.labels = values[rows]
        seconds["tokens"] = time.perf_counter() - start
        self.truth = test.labels.numpy()
        start = time.perf_counter()
        entries: list[tuple[HeadResult, int | None]] = [
            (result, self.backbone.indices[result.spec.layer]) for result in self._train(train, test, self.specs)
        ]
        seconds["heads"] = time.perf_counter() - start
        if not settings.no_pixels:
            start = time.perf_counter()
            entries += [(result, None) for result in self._pixels(tokens, train, test)]
            seconds["pixels"] = time.perf_counter() - start
        chosen = _choose(entries)
        heads = [self._head(result, index, id(result) in chosen) for result, index in entries]
        self.saved = [
            (head, result.head, result.best_epoch)
            for head, (result, index) in zip(heads, entries)
            if head.chosen and index is not None
        ]
        held = len(divide(len(train), HOLDOUT)[1])
        notes = [*self.left_out, *images.left_out, *self._rare(train)]
        notes += [f"{r.spec.pooling} with the learning rate {r.spec.lr:g} diverged." for r, _ in entries if r.diverged]
        report = self._describe(
            command,
            [train, test],
            held,
            heads,
            settings.optimizer,
            seconds=seconds,
            notes=notes,
            skipped=tokens.skipped,
            plan=self.plan,
        )
        if settings.task == "multilabel":
            for name, part in (("training images", train), ("test images", test)):
                report.counts[name] = part.labels.sum(0).long().tolist()
        best = report.best()
        if best is not None:
            outputs: dict[int, Any] = {id(head): result.best for head, (result, _) in zip(heads, entries)}
            weights = draws(len(self.truth))
            report.differences = [
                self._difference(report.name(head), outputs[id(best)], outputs[id(head)], weights)
                for head in report.chosen()
                if head is not best
            ]
        return report

    def _train(self, train: Features, test: Features, specs: Sequence[HeadSpec]) -> list[HeadResult]:
        settings = self.settings
        rows, held_rows = divide(len(train), HOLDOUT)
        labels = train.labels[rows]
        objective: Objective = (
            MultiLabel()
            if settings.task == "multilabel"
            else Regression(labels.mean(0), labels.std(0).clamp_min(1e-12))
        )
        with show_progress(self.console) as progress:
            results = HeadTraining(
                train,
                test,
                list(specs),
                rows,
                held_rows,
                epochs=settings.epochs,
                batch_size=min(settings.images_a_step, len(rows)),
                warmup_epochs=WARMUP * settings.epochs,
                seed=0,
                device=torch.device(settings.device),
                state=None,
                progress=progress,
                objective=objective,
            ).results()
        if isinstance(objective, Regression):
            for result in results:
                objective.rescale(result.head.classifier)
        return results

    def _pixels(self, tokens: TokenReader, *features: Features) -> list[HeadResult]:
        """The baseline without a network."""
        images, found = self.images, []
        for part, rows, known in zip((images.train, images.test), tokens.readable, features):
            with show_progress(self.console) as progress:
                pixels = read_pixels(
                    Subset(part.dataset, rows.tolist()),
                    images.size,
                    images.mean,
                    images.std,
                    images.classes,
                    self.settings.workers,
                    progress,
                )
            pixels.labels = known.labels
            found.append(pixels)
        return self._train(found[0], found[1], self.settings.grid("gap", [0]))

    def _rare(self, train: Features) -> list[str]:
        """Notes about classes that no training image has."""
        if self.settings.task != "multilabel":
            return []
        names = [name for name, count in zip(self.images.classes, train.labels.sum(0)) if count == 0]
        return [f"No training image has these classes: {', '.join(names)}."] if names else []

    def _head(self, result: HeadResult, index: int | None, chosen: bool) -> TaskHead:
        head = TaskHead(
            name=result.spec.pooling if index is not None else "pixels",
            spec=result.spec,
            layer=result.layer if index is not None else "–",
            layer_index=index,
            parameters=sum(parameter.numel() for parameter in result.head.parameters()),
            held_out=result.held_out_accuracy,
        )
        if chosen:
            outputs: Any = result.best
            weights = draws(len(self.truth))
            for metric, function in self.functions.items():
                value, drawn = self._values(function, outputs, weights)
                head.classes[metric.key] = value.tolist()
                head.scores[metric.key] = (_mean(value), _interval(drawn))
        return head

    def _values(self, function: Function, outputs: Any, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A metric for each class (K,), and its mean over classes for each draw (R,)."""
        ones = np.ones((1, len(self.truth)))
        pairs = list(zip(outputs.double().numpy().T, self.truth.T))
        value = np.concatenate([function(*pair, ones) for pair in pairs])
        drawn = np.stack([function(*pair, weights) for pair in pairs])
        return value, np.array([_mean(column) for column in drawn.T])

    def _difference(self, name: str, outputs: Any, others: Any, weights: np.ndarray) -> Difference:
        function = next(iter(self.functions.values()))
        (value, drawn), (other, others_drawn) = (self._values(function, one, weights) for one in (outputs, others))
        return Difference(name, _mean(value) - _mean(other), _interval(drawn - others_drawn))


def _choose(entries: Sequence[tuple[HeadResult, int | None]]) -> set[int]:
    """Indices of the best head by the held-out images, for each pooling and layer, and for pixels."""
    chosen: dict[tuple[str, int | None], HeadResult] = {}
    for result, index in entries:
        key = (result.spec.pooling, index)
        sound = result.best is not None and not result.diverged
        if sound and (key not in chosen or result.held_out_accuracy > chosen[key].held_out_accuracy):
            chosen[key] = result
    return {id(result) for result in chosen.values()}


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _interval(values: np.ndarray) -> Interval:
    if not np.isfinite(values).any():
        return Interval(math.nan, math.nan)
    low, high = np.nanquantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))
