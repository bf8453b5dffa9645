"""Report of a probe for a task other than classification: heads with several metrics, and values of each class.

`results.json` has everything, `results.csv` one row per head, `classes.csv` one row per class or target; `report.md`
and `report.html` have the tables and figures.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from visionattn.page import Section, write_pages, write_table, write_text
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.report.report import Skipped, percent, plain
from visionattn.probe.statistics import Interval
from visionattn.probe.tokens.interface import Layer

__all__ = ["Difference", "Metric", "TaskHead", "TaskReport"]


class Metric(NamedTuple):
    """A metric of heads.

    Attributes:
        key: Name in the files.
        name: Name in tables.
        share: Whether it is a share, shown in percent.
    """

    key: str
    name: str
    share: bool = True

    @property
    def title(self) -> str:
        """Title of its column."""
        return f"{self.name}, %" if self.share else self.name

    def write(self, value: float, interval: Interval | None = None) -> str:
        """Format a value with its interval for a table."""
        if self.share:
            return percent(value, interval)
        text = f"{value:.3g}" if math.isfinite(value) else "–"
        if interval is None or not all(map(math.isfinite, interval)):
            return text
        return f"{text} [{interval.low:.3g}, {interval.high:.3g}]"


@dataclass
class TaskHead:
    """A head after its training.

    Attributes:
        name: Name of the head, such as "linear", "ep_32" or "pixels".
        spec: Settings of its training.
        layer: Name of its layer.
        layer_index: Index of its layer in the backbone; None for pixels.
        parameters: Number of its parameters.
        held_out: First metric on the held-out images.
        scores: Metrics on the test images with 95 % intervals; empty for heads that were not selected.
        classes: Metrics of each class or target, by key.
    """

    name: str
    spec: HeadSpec
    layer: str
    layer_index: int | None
    parameters: int
    held_out: float
    scores: dict[str, tuple[float, Interval]] = field(default_factory=dict)
    classes: dict[str, list[float]] = field(default_factory=dict)

    @property
    def chosen(self) -> bool:
        """Whether it was selected on the held-out images."""
        return bool(self.scores)


class Difference(NamedTuple):
    """First metric of the best head minus that of another, with its 95 % interval over the same test images."""

    other: str
    value: float
    interval: Interval


@dataclass(repr=False)
class TaskReport:
    """Result of `visionattn.probe` for a task other than classification.

    Attributes:
        task: "segmentation", "multilabel" or "regression".
        command: The command line.
        backbone: Name, origin and hash of the weights, parameters; plain values.
        data: Data set, numbers of images, transform; plain values.
        protocol: How heads were trained and selected; plain values.
        versions: Versions of Python and the packages.
        layers: Layers that were read.
        indices: Their indices among the backbone's layers.
        classes: Names of classes or targets.
        held_out: Number of training images held out for selection.
        metrics: Metrics of the test images; heads are selected by the first one.
        class_metrics: Metrics of each class.
        heads: All heads that were trained.
        differences: Differences between the best head and the others.
        words: Explanation of the table of heads.
        examples: Example images below the folder, with captions.
        counts: Further values of each class, by the title of their column.
        seconds: Time of each part of the work.
        notes: Notes for the reader.
        skipped: Images that could not be read.
        plan: Hash of all that the numbers depend on.
        folder: Folder of the report; None if it was not written.
    """

    task: str
    command: str
    backbone: dict[str, Any]
    data: dict[str, Any]
    protocol: dict[str, Any]
    versions: dict[str, str]
    layers: tuple[Layer, ...]
    indices: list[int]
    classes: tuple[str, ...]
    held_out: int
    metrics: tuple[Metric, ...]
    class_metrics: tuple[Metric, ...]
    heads: list[TaskHead]
    differences: list[Difference] = field(default_factory=list)
    words: str = ""
    examples: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    plan: str = ""
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"TaskReport({self.backbone['name']} on {self.data['dataset']}: {self.summary()})"

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><tr>{head}</tr>{body}</table><p>{escape(self.summary())}</p>"

    def chosen(self) -> list[TaskHead]:
        """The heads selected on the held-out images, one per kind and layer."""
        return [head for head in self.heads if head.chosen]

    def best(self) -> TaskHead | None:
        """The best head on the backbone by the held-out images; None if all diverged."""
        heads = [head for head in self.chosen() if head.layer_index is not None]
        return max(heads, key=lambda head: head.held_out, default=None)

    def note_ends(self) -> None:
        """Add a note if a selected learning rate is the lowest or the highest of several."""
        rates = {head.spec.lr for head in self.heads}
        at_end = [head for head in self.chosen() if head.spec.lr in (min(rates), max(rates))]
        if at_end and len(rates) > 1:
            names = ", ".join(f"{self.name(head)} ({head.spec.lr:g})" for head in at_end)
            self.notes.append(f"The selected learning rate is at an end of the range for {names}: extend --lrs.")

    def name(self, head: TaskHead) -> str:
        """Name of a head, with its layer if several were read."""
        return f"{head.name} at {head.layer}" if len(self.layers) > 1 and head.layer_index is not None else head.name

    def summary(self) -> str:
        """The result in one line."""
        best, first = self.best(), self.metrics[0]
        if best is None:
            return "All heads diverged."
        value = first.write(*best.scores[first.key])
        words = f"Best head: {self.name(best)}, {first.name} {value}{' %' if first.share else ''}."
        pixels = next((head for head in self.chosen() if head.layer_index is None), None)
        if pixels is not None:
            value = first.write(*pixels.scores[first.key])
            words += f" Pixels alone: {value}{' %' if first.share else ''}."
        return words

    def _table(self) -> list[list[str]]:
        table = [["head", "layer", "chosen", f"held out: {self.metrics[0].title}"]]
        table[0] += [metric.title for metric in self.metrics] + ["parameters"]
        for head in self.chosen():
            spec = head.spec
            row = [head.name, head.layer, f"lr {spec.lr:g}, decay {spec.weight_decay:g}, seed {spec.seed}"]
            row.append(self.metrics[0].write(head.held_out))
            row += [metric.write(*head.scores[metric.key]) for metric in self.metrics]
            table.append([*row, f"{head.parameters:,}"])
        return table

    def table(self) -> Table:
        """The heads for a terminal."""
        header, *rows = self._table()
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in header:
            table.add_column(title, justify="left" if title in ("head", "layer", "chosen") else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table

    def records(self) -> list[dict[str, Any]]:
        """One row per head; missing values are None."""
        rows = []
        for head in self.heads:
            spec = head.spec
            row: dict[str, Any] = {"head": head.name, "layer": head.layer, "layer_index": head.layer_index}
            row |= {"optimizer": spec.optimizer, "lr": spec.lr, "weight_decay": spec.weight_decay, "seed": spec.seed}
            row |= {"parameters": head.parameters, "chosen": head.chosen, "held_out": head.held_out}
            for metric in self.metrics:
                value, interval = head.scores.get(metric.key, (math.nan, Interval(math.nan, math.nan)))
                row |= {metric.key: value, f"{metric.key}_low": interval.low, f"{metric.key}_high": interval.high}
            rows.append(plain(row))
        return rows

    def class_records(self) -> list[dict[str, Any]]:
        """One row per class, with the metrics of each selected head."""
        rows = []
        for number, name in enumerate(self.classes):
            row: dict[str, Any] = {"class": name, **{title: values[number] for title, values in self.counts.items()}}
            for head in self.chosen():
                row |= {f"{self.name(head)} {key}": values[number] for key, values in head.classes.items()}
            rows.append(plain(row))
        return rows

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        return plain(
            {
                "task": self.task,
                "command": self.command,
                "plan": self.plan,
                "versions": self.versions,
                "backbone": self.backbone,
                "data": self.data,
                "protocol": self.protocol,
                "layers": [{"index": index, **vars(layer)} for index, layer in zip(self.indices, self.layers)],
                "heads": self.records(),
                "classes": self.class_records(),
                "summary": self.summary(),
                "differences": [{**one._asdict(), "interval": list(one.interval)} for one in self.differences],
                "seconds": self.seconds,
                "notes": self.notes,
                "skipped": [entry._asdict() for entry in self.skipped],
            }
        )

    def sections(self) -> list[Section]:
        """All sections with text and tables, in order."""
        backbone, data, first = self.backbone, self.data, self.metrics[0]
        seconds = ", ".join(f"{name} {value:,.1f} s" for name, value in self.seconds.items())
        opening = [
            f"Frozen weights: {backbone['weights']}, SHA-256 {backbone['sha256'][:16]}, "
            f"{backbone['parameters'] / 1e6:,.2f} million parameters. {data['train_images']:,} training images, "
            f"{self.held_out:,} of which held out for selection, and {data['test_images']:,} test images; "
            f"{data['transform']}.",
            f"{len(self.heads)} heads, trained for {self.protocol['epochs']} epochs. Time: {seconds}.",
            self.summary(),
        ]
        sections = [
            Section(f"{backbone['name']} on {data['dataset']}", opening),
            Section("Heads", [self.words], self._table()),
        ]
        best = self.best()
        if best is not None and self.differences:
            table = [["against", f"difference in {first.title}"]]
            table += [[one.other, first.write(one.value, one.interval)] for one in self.differences]
            words = f"{first.name} on the test images minus that of the other head, bootstrapped over the same images."
            sections.append(Section(f"{self.name(best)} compared with the others", [words], table))
        sections.append(Section("Classes" if self.task != "regression" else "Targets", [], self._class_table()))
        if self.examples:
            sections.append(Section("Examples", pictures=self.examples))
        notes = list(self.notes)
        if self.skipped:
            notes.append(f"{len(self.skipped)} images could not be read and were skipped:")
            notes += [f"{entry.part}: {entry.name}: {entry.reason}" for entry in self.skipped]
        if notes:
            sections.append(Section("Notes", notes))
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        protocol = ", ".join(f"{key} {value}" for key, value in self.protocol.items())
        sections.append(Section("Reproduction", [f"`{self.command}`", f"{protocol}.", versions]))
        return sections

    def _class_table(self) -> list[list[str]]:
        heads = self.chosen()
        header = ["class" if self.task != "regression" else "target", *self.counts]
        columns = [(head, metric) for metric in self.class_metrics for head in heads]
        table = [header + [f"{self.name(head)}: {metric.title}" for head, metric in columns]]
        for number, name in enumerate(self.classes):
            row = [name, *(f"{values[number]:,}" for values in self.counts.values())]
            table.append(row + [metric.write(head.classes[metric.key][number]) for head, metric in columns])
        return table

    def write(self, folder: str | Path) -> None:
        """Write all files except the examples, which were written before, each completely or not at all.

        Raises:
            StorageError: A file could not be written.
        """
        folder = Path(folder)
        write_pages(self.sections(), folder)
        write_table(self.records(), folder / "results.csv")
        write_table(self.class_records(), folder / "classes.csv")
        write_text(folder / "results.json", json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        ours = {folder / file for file, _ in self.examples}
        for path in folder.glob("examples/*.jpg"):
            if path not in ours:
                path.unlink()
        self.folder = folder
