"""The report of a probing run: its numbers as plain values, and the selected heads as files.

The folder `heads` contains the selected heads as safetensors, each with its card; `load_head` opens them.
`visionattn.probe.report.sections` makes text and tables, and `visionattn.probe.report.rendering` writes the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from visionattn.probe.classes import ClassScore, class_scores
from visionattn.probe.few_shot import FewShotResult
from visionattn.probe.heads.files import load_head
from visionattn.probe.heads.results import HeadResult, SweepResult
from visionattn.probe.knn import NeighboursResult
from visionattn.probe.pixels import SIDE, PixelBaseline, PixelComparison
from visionattn.probe.statistics import (
    Interval,
    bootstrap_interval,
    holm_correction,
    mcnemar_test,
    wilson_interval,
)
from visionattn.probe.tokens.interface import Layer

__all__ = [
    "Answers",
    "LayerNeighbours",
    "PairedTest",
    "Report",
    "Skipped",
    "dataset_name",
    "load_head",
    "percent",
    "plain",
]


class LayerNeighbours(NamedTuple):
    """k-NN at a layer.

    Attributes:
        layer: Index of the layer among those of the features.
        source: `"class"` or `"mean"`.
        result: Accuracies and predictions.
        standardized: Whether channels were normalised to zero mean and unit variance.
    """

    layer: int
    source: str
    result: NeighboursResult
    standardized: bool = False

    @property
    def method(self) -> str:
        """Name in tables."""
        return f"k-NN {self.source}" + (", standardised" if self.standardized else "")


class Skipped(NamedTuple):
    """An image that could not be read: its split, its name, and the reason."""

    part: str
    name: str
    reason: str


class PairedTest(NamedTuple):
    """A head compared with another on the same test images.

    Attributes:
        other: Name of the other head.
        difference: Accuracy minus that of the other head.
        interval: 95 % interval of the difference, bootstrapped over images.
        p: P value of McNemar's exact test.
        p_holm: P value after Holm's correction for the number of tests.
    """

    other: str
    difference: float
    interval: Interval
    p: float
    p_holm: float


class Answers(NamedTuple):
    """Predictions of a head or k-NN for the test images.

    Attributes:
        name: Name from `Report.name`.
        held_out_accuracy: Accuracy on the held-out images.
        predictions: Predicted class of each image, int64 (n,).
        correct: Whether the prediction is correct, bool (n,).
        parameters: Number of parameters of the head.
    """

    name: str
    held_out_accuracy: float
    predictions: Tensor
    correct: Tensor
    parameters: int


@dataclass(repr=False)
class Report:
    """Result of `visionattn.probe` for classification.

    Attributes:
        command: The command line.
        backbone: Name, origin and hash of the weights, parameters; plain values.
        data: Data set, splits, numbers of images, transform; plain values.
        protocol: How heads were trained and selected; plain values.
        versions: Versions of Python and the packages.
        layers: Layers that were read.
        indices: Their indices among the backbone's layers.
        classes: Names of the classes.
        held_out: Number of training images held out for selection.
        sweep: Results of the heads.
        neighbours: Results of k-NN.
        few_shot: Results with a few training images.
        seconds: Time of each part of the work.
        notes: Notes for the reader.
        skipped: Images that could not be read.
        maps: Files of attention maps below the folder, with captions.
        pixels: The baseline without a network; None if it was skipped.
        plan: Hash of all that the numbers depend on.
        test_names: Names of the test images; empty if they are not known.
        test_labels: Classes of the test images, int64 (n,).
        folder: Folder of the report; None if it was not written.
    """

    command: str
    backbone: dict[str, Any]
    data: dict[str, Any]
    protocol: dict[str, Any]
    versions: dict[str, str]
    layers: tuple[Layer, ...]
    indices: list[int]
    classes: tuple[str, ...]
    held_out: int
    sweep: SweepResult
    neighbours: list[LayerNeighbours] = field(default_factory=list)
    few_shot: list[FewShotResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    maps: list[tuple[str, str]] = field(default_factory=list)
    pixels: PixelBaseline | None = None
    plan: str = ""
    test_names: Sequence[str] = ()
    test_labels: Tensor | None = None
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"Report({self.backbone['name']} on {self.data['dataset']}: {self.summary()})"

    def _scores(self) -> list[tuple[str, str]]:
        """Best head of each pooling and best k-NN: name, and test accuracy in percent with its interval."""
        entries = [(self.name(entry), entry.result.chosen) for entry in self.best_neighbours()]
        heads = [(self.name(result), result.best) for result in self.best()]
        return [(name, percent(score.accuracy, score.interval) if score else "–") for name, score in [*entries, *heads]]

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{score}</td></tr>" for name, score in self._scores())
        head = "<tr><th>head</th><th>test accuracy, % [95 %]</th></tr>"
        return f"<table>{head}{rows}</table><p>{escape(self.summary())}</p>"

    def name(self, result: HeadResult | LayerNeighbours) -> str:
        """Name of a head or k-NN, with its layer if several were read."""
        several = len(self.layers) > 1
        if isinstance(result, LayerNeighbours):
            return result.method + (f" at {self.layers[result.layer].name}" if several else "")
        return result.spec.pooling + (f" at {result.layer}" if several else "")

    def best(self) -> list[HeadResult]:
        """For each pooling, the selected head at the layer with the highest held-out accuracy, in the given order."""
        found: dict[str, HeadResult] = {}
        for result in self.sweep.chosen:
            other = found.get(result.spec.pooling)
            if other is None or result.held_out_accuracy > other.held_out_accuracy:
                found[result.spec.pooling] = result
        return list(found.values())

    def best_neighbours(self) -> list[LayerNeighbours]:
        """For each source of vectors, raw and standardised, the k-NN at the layer with the best held-out accuracy."""
        found: dict[str, LayerNeighbours] = {}
        for entry in self.neighbours:
            other = found.get(entry.method)
            if other is None or entry.result.chosen.held_out_accuracy > other.result.chosen.held_out_accuracy:
                found[entry.method] = entry
        return list(found.values())

    def reference(self) -> HeadResult | None:
        """The head with which the others are compared: the best head of efficient probing by held-out accuracy.

        Without efficient probing, the best of all heads; None if all heads diverged.
        """
        best = self.best()
        probing = [result for result in best if result.spec.pooling.split("_")[0] == "ep"]
        return max(probing or best, key=lambda result: result.held_out_accuracy, default=None)

    def answers(self) -> list[Answers]:
        """Predictions of the best k-NN and of the best head of each pooling, k-NN first."""
        pairs = [(self.name(entry), entry.result.chosen) for entry in self.best_neighbours()]
        found = [Answers(name, pair.held_out_accuracy, pair.predictions, pair.correct, 0) for name, pair in pairs]
        for result in self.best():
            if result.best is not None:
                parameters = sum(parameter.numel() for parameter in result.head.parameters())
                score = result.best
                found.append(
                    Answers(self.name(result), result.held_out_accuracy, score.predictions, score.correct, parameters)
                )
        return found

    def best_answers(self) -> Answers | None:
        """Predictions of the head or k-NN with the highest held-out accuracy; ties: a head."""
        return max(self.answers(), key=lambda one: (one.held_out_accuracy, one.parameters > 0), default=None)

    def class_scores(self) -> list[ClassScore]:
        """Scores of each class for the best head or k-NN, the worst first; empty if the labels are not known."""
        best = self.best_answers()
        if best is None or self.test_labels is None:
            return []
        return class_scores(best.predictions, self.test_labels, self.classes)

    def tests(self) -> list[PairedTest]:
        """The reference compared with the best of each other pooling and of k-NN."""
        reference = self.reference()
        if reference is None or reference.best is None:
            return []
        correct = reference.best.correct.numpy()
        others = {self.name(entry): entry.result.chosen.correct for entry in self.best_neighbours()}
        others |= {self.name(r): r.best.correct for r in self.best() if r is not reference and r.best is not None}
        raw = {name: mcnemar_test(correct, other.numpy()) for name, other in others.items()}
        holm = dict(zip(raw, holm_correction(list(raw.values()))))
        tests = []
        for name, other in others.items():
            scores = correct.astype(float) - other.numpy()
            interval = bootstrap_interval(scores) if len(scores) > 1 else Interval(math.nan, math.nan)
            tests.append(PairedTest(name, float(scores.mean()), interval, raw[name], holm[name]))
        return tests

    def pixel_comparisons(self) -> list[PixelComparison]:
        """Pixels compared with the backbone: k-NN with its best k-NN, linear with its best linear head.

        If no linear head was trained, the linear classifier is compared with the best of all heads.
        """
        found: list[PixelComparison] = []
        if self.pixels is None:
            return found

        def compare(method: str, pixels: Tensor, name: str, backbone: Tensor) -> None:
            p = mcnemar_test(pixels.numpy(), backbone.numpy())
            found.append(
                PixelComparison(method, float(pixels.double().mean()), name, float(backbone.double().mean()), p)
            )

        best_entry = max(self.best_neighbours(), key=lambda entry: entry.result.chosen.held_out_accuracy, default=None)
        if best_entry is not None and self.pixels.neighbours:
            pixels = self.pixels.best_neighbours[1].chosen.correct
            compare("k-NN", pixels, self.name(best_entry), best_entry.result.chosen.correct)
        heads = [result for result in self.best() if result.best is not None]
        heads = [result for result in heads if result.spec.pooling in ("cls", "gap")] or heads
        best_head = max(heads, key=lambda result: result.held_out_accuracy, default=None)
        if self.pixels.linear is not None and best_head is not None and best_head.best is not None:
            compare("linear", self.pixels.linear.score.correct, self.name(best_head), best_head.best.correct)
        return found

    def summary(self) -> str:
        """The result in one line: the best head by held-out accuracy, and whether pixels alone are better."""
        reference = max(self.best(), key=lambda result: result.held_out_accuracy, default=None)
        words = "All heads diverged."
        if reference is not None and reference.best is not None:
            score = reference.best
            words = f"Best head: {self.name(reference)}, {percent(score.accuracy, score.interval)} %."
        compared = self.pixel_comparisons()
        wins = [str(one) for one in compared if one.pixels_win]
        if wins:
            return f"{words} {SIDE} x {SIDE} pixels beat the backbone: {'; '.join(wins)}."
        if compared:
            words += f" {SIDE} x {SIDE} pixels: {'; '.join(map(str, compared))}."
        return words

    def _pixel_records(self) -> list[dict[str, Any]]:
        """Rows of the baseline, in the form of those of k-NN and heads."""
        if self.pixels is None:
            return []
        place = {"pooling": "pixels", "layer": f"{SIDE} x {SIDE} pixels", "layer_index": None}
        rows: list[dict[str, Any]] = []
        for standardized, result in self.pixels.neighbours.items():
            for row in result.rows():
                accuracy = {key.replace("test_accuracy", "test_best"): value for key, value in row.items()}
                rows.append({"method": "pixels k-NN", **place, "standardized": standardized, **accuracy})
        if (linear := self.pixels.linear) is not None:
            score, spec = linear.score, linear.spec
            settings = {"optimizer": spec.optimizer, "lr": spec.lr, "weight_decay": spec.weight_decay}
            rows.append(
                {
                    "method": "pixels head",
                    **place,
                    **settings,
                    "seed": spec.seed,
                    "chosen": True,
                    "pooling_parameters": 0,
                    "classifier_parameters": linear.parameters,
                    "epochs": self.sweep.epochs,
                    "best_epoch": linear.best_epoch,
                    "held_out_accuracy": linear.held_out_accuracy,
                    "test_best": score.accuracy,
                    "test_best_low": score.interval.low,
                    "test_best_high": score.interval.high,
                    "calibration_error": score.calibration_error,
                    "nll": float(score.nll.mean()),
                }
            )
        return rows

    def records(self) -> list[dict[str, Any]]:
        """One row per head, k-NN first and pixels last; missing values are None."""
        rows: list[dict[str, Any]] = []
        for entry in self.neighbours:
            for row in entry.result.rows():
                accuracy = {key.replace("test_accuracy", "test_best"): value for key, value in row.items()}
                method = {"method": "k-NN", "pooling": entry.source, "layer": self.layers[entry.layer].name}
                index = self.indices[entry.layer]
                rows.append({**method, "layer_index": index, "standardized": entry.standardized, **accuracy})
        chosen = {id(result) for result in self.sweep.chosen}
        for result, row in zip(self.sweep.heads, self.sweep.rows()):
            index = self.indices[result.spec.layer]
            interval = Interval(math.nan, math.nan)
            if id(result) in chosen and result.best is not None and len(result.best.nll) > 1:
                interval = bootstrap_interval(result.best.nll.numpy())
            del row["refit"]
            rows.append(
                {"method": "head", **row, "layer_index": index, "nll_low": interval.low, "nll_high": interval.high}
            )
        rows += self._pixel_records()
        for row in rows:
            held = row["held_out_accuracy"]
            missing = Interval(math.nan, math.nan)
            interval = wilson_interval(round(held * self.held_out), self.held_out) if math.isfinite(held) else missing
            row["held_out_low"], row["held_out_high"] = interval
        keys = list(dict.fromkeys(key for row in reversed(rows) for key in row))
        return [{key: plain(row.get(key)) for key in keys} for row in rows]

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        reference, best = self.reference(), self.best_answers()
        content: dict[str, Any] = {
            "command": self.command,
            "plan": self.plan,
            "versions": self.versions,
            "backbone": self.backbone,
            "data": self.data,
            "protocol": self.protocol,
            "layers": [{"index": index, **asdict(layer)} for index, layer in zip(self.indices, self.layers)],
            "classes": list(self.classes),
            "heads": self.records(),
            "few_shot": [
                {**asdict(result), "mean": result.mean, "low": result.interval.low, "high": result.interval.high}
                for result in self.few_shot
            ],
            "pixels": [
                {**one._asdict(), "pixels_win": one.pixels_win} for one in self.pixel_comparisons()
            ],
            "summary": self.summary(),
            "answers": [
                {
                    "name": one.name,
                    "held_out_accuracy": one.held_out_accuracy,
                    "accuracy": float(one.correct.double().mean()),
                    "parameters": one.parameters,
                }
                for one in self.answers()
            ],
            "best": None if best is None else best.name,
            "classes_of_best": [score._asdict() for score in self.class_scores()],
            "compared": None if reference is None else self.name(reference),
            "tests": [
                {**test._asdict(), "interval": list(test.interval)} for test in self.tests()
            ],
            "seconds": self.seconds,
            "notes": self.notes,
            "skipped": [entry._asdict() for entry in self.skipped],
        }  # fmt: skip
        return plain(content)


def plain(value: Any) -> Any:
    """Replace numbers that are not finite by None, which JSON supports and tables leave empty."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def dataset_name(data: Mapping[str, Any]) -> str:
    """Name of a report's data; for a folder, the name of the folder."""
    return Path(data["root"]).name if data["dataset"] == "folder" and data["root"] else data["dataset"]


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """Format a share in %, as in all tables: `92.5 [89.1, 94.8]`."""
    text = f"{100 * value:.1f}" if math.isfinite(value) else "–"
    if interval is None or not all(map(math.isfinite, interval)):
        return text
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
