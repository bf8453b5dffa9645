"""What a probing run leaves in its folder: numbers, a report to read, and the chosen heads.

`results.json` has everything, with the command that gives it again; `results.csv` a row a head, those that were not
chosen too. `report.md` and `report.html` have tables, curves and attention maps; the HTML file needs no other. `heads`
has the chosen heads as safetensors, each with its card, which `load_head` opens.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visionattn.errors import CheckpointError
from visionattn.files import atomic_path
from visionattn.probe.banks import Head
from visionattn.probe.few_shot import FewShotResult
from visionattn.probe.knn import Neighbours, NeighboursResult
from visionattn.probe.poolings import create_pooling
from visionattn.probe.results import HeadResult, SweepResult
from visionattn.probe.statistics import Interval, bootstrap_interval, mcnemar_test, t_interval, wilson_interval
from visionattn.probe.tokens import Layer

__all__ = [
    "CurvePoint",
    "LayerNeighbours",
    "PairedTest",
    "Report",
    "Skipped",
    "draw_curves",
    "head_file",
    "load_head",
    "percent",
    "write_report",
]


class LayerNeighbours(NamedTuple):
    """k-NN at a layer.

    Attributes:
        layer: Index into the features' layers.
        source: `"class"` or `"mean"`.
        result: What was found.
    """

    layer: int
    source: str
    result: NeighboursResult


class Skipped(NamedTuple):
    """An image that could not be read: its part of the data, its name there, and what is wrong with it."""

    part: str
    name: str
    reason: str


class PairedTest(NamedTuple):
    """A head against another on the same test images.

    Attributes:
        other: Name of the other head.
        difference: Accuracy less the other's.
        interval: Of the difference, bootstrapped over images, 95 %.
        p: Of McNemar's exact test.
        p_holm: The same after Holm's correction for the number of tests.
    """

    other: str
    difference: float
    interval: Interval
    p: float
    p_holm: float


@dataclass
class Report:
    """All that is reported.

    Attributes:
        command: The command line.
        backbone: Name, origin and hash of the weights, parameters; plain values.
        data: Data set, parts, numbers of images, transform; plain values.
        protocol: How heads were trained and chosen; plain values.
        versions: Of Python and the packages.
        layers: That were read.
        indices: Their places among the backbone's layers.
        classes: Names.
        held_out: Training images that chose.
        sweep: The heads.
        neighbours: k-NN.
        few_shot: Poolings with a few training images.
        seconds: Of each part of the work.
        notes: In words.
        skipped: Images that could not be read.
        maps: Files below the folder, with what each shows.
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

    def name(self, result: HeadResult | LayerNeighbours) -> str:
        """What a head, or a k-NN, is called: its layer is said where several were read."""
        several = len(self.layers) > 1
        if isinstance(result, LayerNeighbours):
            return f"k-NN {result.source}" + (f" at {self.layers[result.layer].name}" if several else "")
        return result.spec.pooling + (f" at {result.layer}" if several else "")

    def best(self) -> list[HeadResult]:
        """Of each pooling the chosen head at the layer with the highest held-out accuracy, as poolings were given."""
        found: dict[str, HeadResult] = {}
        for result in self.sweep.chosen:
            other = found.get(result.spec.pooling)
            if other is None or result.held_out_accuracy > other.held_out_accuracy:
                found[result.spec.pooling] = result
        return list(found.values())

    def best_neighbours(self) -> list[LayerNeighbours]:
        """Of each source of vectors the k-NN at the layer with the highest held-out accuracy."""
        found: dict[str, LayerNeighbours] = {}
        for entry in self.neighbours:
            other = found.get(entry.source)
            if other is None or entry.result.chosen.held_out_accuracy > other.result.chosen.held_out_accuracy:
                found[entry.source] = entry
        return list(found.values())

    def reference(self) -> HeadResult | None:
        """The head that the others are compared with: the best of efficient probing by the held-out images.

        Without efficient probing the best of all, and None where all heads diverged.
        """
        best = self.best()
        probing = [result for result in best if result.spec.pooling.split("_")[0] == "ep"]
        return max(probing or best, key=lambda result: result.held_out_accuracy, default=None)

    def tests(self) -> list[PairedTest]:
        """The reference against the best of each other pooling and of k-NN."""
        reference = self.reference()
        if reference is None or reference.best is None:
            return []
        correct = reference.best.correct.numpy()
        others = {self.name(entry): entry.result.chosen.correct for entry in self.best_neighbours()}
        others |= {self.name(r): r.best.correct for r in self.best() if r is not reference and r.best is not None}
        raw = {name: mcnemar_test(correct, other.numpy()) for name, other in others.items()}
        holm, before = {}, 0.0
        for place, name in enumerate(sorted(raw, key=raw.__getitem__)):
            before = holm[name] = max(before, min(1.0, (len(raw) - place) * raw[name]))
        tests = []
        for name, other in others.items():
            scores = correct.astype(float) - other.numpy()
            interval = bootstrap_interval(scores) if len(scores) > 1 else Interval(math.nan, math.nan)
            tests.append(PairedTest(name, float(scores.mean()), interval, raw[name], holm[name]))
        return tests

    def records(self) -> list[dict[str, Any]]:
        """A row a head, k-NN first; what a row has not is None."""
        rows: list[dict[str, Any]] = []
        for entry in self.neighbours:
            for row in entry.result.rows():
                accuracy = {key.replace("test_accuracy", "test_best"): value for key, value in row.items()}
                method = {"method": "k-NN", "pooling": entry.source, "layer": self.layers[entry.layer].name}
                rows.append({**method, "layer_index": self.indices[entry.layer], **accuracy})
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
        for row in rows:
            held = row["held_out_accuracy"]
            missing = Interval(math.nan, math.nan)
            interval = wilson_interval(round(held * self.held_out), self.held_out) if math.isfinite(held) else missing
            row["held_out_low"], row["held_out_high"] = interval
        keys = list(dict.fromkeys(key for row in reversed(rows) for key in row))
        return [{key: _plain(row.get(key)) for key in keys} for row in rows]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        reference = self.reference()
        content: dict[str, Any] = {
            "command": self.command,
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
            "compared": None if reference is None else self.name(reference),
            "tests": [
                {**test._asdict(), "interval": list(test.interval)} for test in self.tests()
            ],
            "seconds": self.seconds,
            "notes": self.notes,
            "skipped": [entry._asdict() for entry in self.skipped],
        }  # fmt: skip
        return _plain(content)


def _plain(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON has no others, and a table leaves them empty."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- words and tables -------------------------------------------------------------------------------------------------


class _Section(NamedTuple):
    """A heading with what stands below it, in this order."""

    title: str
    words: list[str] = []  # noqa: RUF012
    table: list[list[str]] = []  # noqa: RUF012, the first row is the header
    curve: tuple[str, str] | None = None  # file and SVG
    pictures: list[tuple[str, str]] = []  # noqa: RUF012, files and captions


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """Write a share as every table does: `92.5 [89.1, 94.8]`, in %."""
    text = f"{100 * value:.1f}" if math.isfinite(value) else "–"
    if interval is None or not all(map(math.isfinite, interval)):
        return text
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _heads_table(report: Report) -> list[list[str]]:
    specs = [result.spec for result in report.sweep.heads]
    several = len({spec.seed for spec in specs}) > 1
    table = [["head", "layer", "chosen", "held out, %", "test, %", "test, last epoch, %", "NLL", "parameters"]]
    if several:
        table[0].append("test over seeds, %")
    for entry in report.neighbours:
        pair, layer = entry.result.chosen, report.layers[entry.layer].name
        settings = f"k {pair.k}, T {pair.temperature:g}"
        row = [f"k-NN {entry.source}", layer, settings, _held_out(report, pair), percent(pair.accuracy, pair.interval)]
        table.append([*row, "", "", "0", *[""] * several])
    for result in report.sweep.chosen:
        spec, best, last = result.spec, result.best, result.last
        settings = f"lr {spec.lr:g}, decay {spec.weight_decay:g}, epoch {result.best_epoch}"
        nll = "–"
        if best is not None and len(best.nll) > 1:
            low, high = bootstrap_interval(best.nll.numpy())
            nll = f"{float(best.nll.mean()):.3f} [{low:.3f}, {high:.3f}]"
        row = [
            spec.pooling,
            result.layer,
            settings,
            _held_out(report, result),
            percent(best.accuracy, best.interval) if best else "–",
            percent(last.accuracy, last.interval) if last else "–",
            nll,
            f"{sum(parameter.numel() for parameter in result.head.parameters()):,}",
        ]
        if several:
            alike = [
                other.best.accuracy
                for other in report.sweep.heads
                if other.best is not None and asdict(other.spec) == {**asdict(spec), "seed": other.spec.seed}
            ]
            row.append(percent(sum(alike) / len(alike), t_interval(alike)) if alike else "–")
        table.append(row)
    return table


def _held_out(report: Report, result: HeadResult | Neighbours) -> str:
    accuracy = result.held_out_accuracy
    if not math.isfinite(accuracy):
        return "–"
    return percent(accuracy, wilson_interval(round(accuracy * report.held_out), report.held_out))


def _sections(report: Report) -> list[_Section]:
    data, backbone, reference = report.data, report.backbone, report.reference()
    seconds = ", ".join(f"{name} {value:,.1f} s" for name, value in report.seconds.items())
    sections = [
        _Section(
            f"{backbone['name']} on {data['dataset']}",
            [
                f"Frozen weights: {backbone['weights']}, SHA-256 {backbone['sha256'][:16]}, "
                f"{backbone['parameters'] / 1e6:,.2f} million parameters. {data['train_images']:,} training images, "
                f"{report.held_out:,} of which chose, and {data['test_images']:,} test images of "
                f"{len(report.classes):,} classes, {data['transform']}.",
                f"{len(report.sweep.heads)} heads trained together for {report.sweep.epochs} epochs. Time: {seconds}.",
            ],
        ),
        _Section(
            "Heads",
            [
                "The best head of each pooling and layer, by the held-out images, which chose its epoch too. Brackets "
                "are 95 % intervals: Wilson's for accuracies, bootstrapped over images for the negative log-likelihood "
                "(NLL, nats, of the chosen epoch), Student's over seeds. Parameters are pooling and classifier."
            ],
            _heads_table(report),
        ),
    ]
    tests = report.tests()
    if tests and reference is not None:
        table = [["against", "difference, points", "p, McNemar", "p, Holm"]]
        table += [
            [test.other, percent(test.difference, test.interval), f"{test.p:.2g}", f"{test.p_holm:.2g}"]
            for test in tests
        ]
        sections.append(
            _Section(
                f"{report.name(reference)} against the others",
                [
                    "Paired on the same test images: its accuracy less the other's with the bootstrapped 95 % "
                    "interval, and McNemar's exact test, alone and with Holm's correction for the number of tests."
                ],
                table,
            )
        )
    if len(report.layers) > 1:
        series: dict[str, list[CurvePoint]] = {}
        for entry in report.neighbours:
            pair = entry.result.chosen
            series.setdefault(f"k-NN {entry.source}", []).append(CurvePoint(entry.layer, pair.accuracy, pair.interval))
        for result in report.sweep.chosen:
            if result.best is not None:
                point = CurvePoint(result.spec.layer, result.best.accuracy, result.best.interval)
                series.setdefault(result.spec.pooling, []).append(point)
        curve = draw_curves([layer.name for layer in report.layers], series, "test accuracy, %")
        sections.append(_Section("Layer by layer", ["Bars are Wilson's 95 % intervals."], curve=("layers.svg", curve)))
    if report.few_shot:
        sections.append(_few_shot_section(report))
    if report.maps:
        words = (
            "The picture as the backbone saw it, then one panel a query, from its smallest share of attention (grey) "
            "over red to its largest (yellow), which is written in units of the uniform share: at 1.0 x a query looks "
            "everywhere alike."
        )
        sections.append(_Section("Where the queries look", [words], pictures=report.maps))
    notes = list(report.notes)
    if report.skipped:
        notes.append(f"{len(report.skipped)} images could not be read and were left out:")
        notes += [f"{entry.part}: {entry.name}: {entry.reason}" for entry in report.skipped]
    if notes:
        sections.append(_Section("Notes", notes))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    protocol = ", ".join(f"{key} {value}" for key, value in report.protocol.items())
    sections.append(_Section("To do it again", [f"`{report.command}`", f"{protocol}.", versions]))
    return sections


def _few_shot_section(report: Report) -> _Section:
    sizes = list(dict.fromkeys(result.size for result in report.few_shot))
    labels = [f"{100 * size:g} %" if isinstance(size, float) else f"{size} a class" for size in sizes]
    series: dict[str, list[CurvePoint]] = {}
    cells: dict[str, dict[float, str]] = {}
    for result in report.few_shot:
        name = result.pooling + (f" at {result.layer}" if len(report.layers) > 1 else "")
        series.setdefault(name, []).append(CurvePoint(sizes.index(result.size), result.mean, result.interval))
        cells.setdefault(name, {})[result.size] = percent(result.mean, result.interval)
    table = [["head", *labels], *([name, *(row.get(size, "–") for size in sizes)] for name, row in cells.items())]
    draws = max(len(result.accuracies) for result in report.few_shot)
    words = (
        f"Test accuracy in %, mean of {draws} draws of training images with Student's 95 % interval. Learning rate and "
        "weight decay are those that the whole training set chose; no image is held out, and the last epoch counts."
    )
    curve = draw_curves(labels, series, "test accuracy, %")
    return _Section("Few training images", [words], table, ("few_shot.svg", curve))


# --- curves -----------------------------------------------------------------------------------------------------------

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")


class CurvePoint(NamedTuple):
    """A place along x, and a share with its interval."""

    x: int
    value: float
    interval: Interval


def draw_curves(labels: Sequence[str], series: Mapping[str, Sequence[CurvePoint]], what: str) -> str:
    """Draw shares with their intervals as an SVG.

    Args:
        labels: Of the places along x.
        series: Points of each curve.
        what: Is drawn, the words beside the vertical axis.
    """
    left, top, width, height, legend = 56, 12, 440, 260, 150
    ends = [end for points in series.values() for _, value, interval in points for end in (value, *interval)]
    shown = [100 * end for end in ends if math.isfinite(end)]
    step = next(step for step in (1, 2, 5, 10, 20) if max(shown) - min(shown) <= 6 * step or step == 20)
    low, high = step * math.floor(min(shown) / step), step * math.ceil(max(shown) / step)
    high = max(high, low + step)

    def across(x: float) -> float:
        return left + width * (x + 0.5) / len(labels)

    def up(share: float) -> float:
        return top + height * (high - 100 * share) / (high - low)

    parts = []
    for tick in range(low, high + 1, step):
        y = up(tick / 100)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    every = math.ceil(8 * max(map(len, labels)) / (width / len(labels)))  # a letter takes up to 8 pixels
    for number, label in enumerate(labels):
        if (len(labels) - 1 - number) % every == 0:
            x = across(number)
            parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{html.escape(label)}</text>')
    middle = top + height / 2
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(what)}</text>'
    )
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(_COLOURS) else ""
        # Curves that share their places along x would hide each other's intervals.
        shift = (number - (len(series) - 1) / 2) * min(6, 0.6 * width / len(labels) / len(series))
        places = [(across(point.x) + shift, up(point.value), point.interval) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        for x, y, interval in places:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            if all(map(math.isfinite, interval)):
                ends_of_bar = f'y1="{up(interval.low):.1f}" y2="{up(interval.high):.1f}"'
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends_of_bar} stroke="{colour}"/>')
        y = top + 14 + 16 * number
        parts.append(f'<rect x="{left + width + 12}" y="{y - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 30}" y="{y}">{html.escape(name)}</text>')
    size = f'width="{left + width + legend}" height="{max(top + height + 30, top + 16 * len(series) + 20)}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {style}>' + "".join(parts) + "</svg>"


# --- files ------------------------------------------------------------------------------------------------------------


def write_report(report: Report, folder: str | Path) -> None:
    """Write all files but the maps, which lie there already, each whole or not at all.

    Args:
        report: What was found.
        folder: Of the run; heads, maps and curves of an earlier report in it are replaced, or removed.

    Raises:
        StorageError: A file could not be written.
    """
    folder = Path(folder)
    for result in report.sweep.chosen:
        _write_head(report, result, folder / "heads")
    content, sections = report.to_json(), _sections(report)
    for section in sections:
        if section.curve is not None:
            _write(folder / section.curve[0], section.curve[1])
    _write(folder / "report.md", _markdown(sections))
    _write(folder / "report.html", _html(sections, folder))
    rows = content["heads"]
    with atomic_path(folder / "results.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write(folder / "results.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    heads = [head_file(folder / "heads", report, result) for result in report.sweep.chosen]
    ours = {*heads, *(path.with_suffix(".md") for path in heads), *(folder / file for file, _ in report.maps)}
    ours |= {folder / section.curve[0] for section in sections if section.curve is not None}
    for pattern in ("heads/*-layer*.safetensors", "heads/*-layer*.md", "maps/*.jpg", "layers.svg", "few_shot.svg"):
        for path in folder.glob(pattern):
            if path not in ours:
                path.unlink()


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(sections: Iterable[_Section]) -> str:
    lines: list[str] = []
    for number, section in enumerate(sections):
        lines += [f"{'##' if number else '#'} {section.title}", ""]
        listed = section.title == "Notes"
        for words in section.words:
            lines += [f"- {words}"] if listed else [words, ""]
        if section.table:
            header, *rows = section.table
            lines += ["| " + " | ".join(map(_cell, header)) + " |", "|" + " --- |" * len(header)]
            lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
            lines.append("")
        if section.curve is not None:
            lines += [f"![{section.title}]({section.curve[0]})", ""]
        for file, caption in section.pictures:
            lines += [f"{caption}:", "", f"![{caption}]({file})", ""]
        if listed:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
div { overflow-x: auto; } img { max-width: 100%; } code { font-size: 13px; overflow-wrap: anywhere; }
"""


def _html(sections: Sequence[_Section], folder: Path) -> str:
    """One page that needs no other file."""
    body: list[str] = []
    for number, section in enumerate(sections):
        level = "h2" if number else "h1"
        body.append(f"<{level}>{html.escape(section.title)}</{level}>")
        for words in section.words:
            text = html.escape(words)
            code = len(words) > 1 and words[0] == words[-1] == "`"
            body.append(f"<p><code>{text[1:-1]}</code></p>" if code else f"<p>{text}</p>")
        if section.table:
            header, *rows = section.table
            body.append("<div><table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>")
            for row in rows:
                body.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
            body.append("</table></div>")
        if section.curve is not None:
            body.append(f"<div>{section.curve[1]}</div>")
        for file, caption in section.pictures:
            data = base64.b64encode((folder / file).read_bytes()).decode()
            text = html.escape(caption)
            body.append(f'<p>{text}</p><img alt="{text}" src="data:image/jpeg;base64,{data}">')
    title = html.escape(sections[0].title)
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return head + "</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


# --- heads ------------------------------------------------------------------------------------------------------------


def head_file(folder: Path, report: Report, result: HeadResult) -> Path:
    """Where a chosen head stands."""
    return folder / f"{result.spec.pooling}-layer{report.indices[result.spec.layer]}.safetensors"


def _write_head(report: Report, result: HeadResult, folder: Path) -> None:
    spec, layer, best = result.spec, report.layers[result.spec.layer], result.best
    path = head_file(folder, report, result)
    facts = {
        "pooling": spec.pooling,
        "layer": {"index": report.indices[spec.layer], **asdict(layer)},
        "classes": list(report.classes),
        "backbone": report.backbone,
        "data": report.data,
        "command": report.command,
    }
    with atomic_path(path) as temporary:
        save_file(
            {key: value.contiguous() for key, value in result.head.state_dict().items()},
            str(temporary),
            {"visionattn_head": json.dumps(facts, ensure_ascii=False)},
        )
    data, backbone = report.data, report.backbone
    low, high = best.interval if best else (math.nan, math.nan)
    accuracy = percent(best.accuracy, (low, high)) if best else "–"
    card = [
        f"# {path.stem}",
        "",
        f"Pooling `{spec.pooling}`, batch norm and linear classifier for {len(report.classes)} classes, on the frozen "
        f"layer `{layer.name}` (index {report.indices[spec.layer]}) of `{backbone['name']}`.",
        "",
        f"- Backbone's weights: {backbone['weights']}, SHA-256 `{backbone['sha256']}`",
        f"- Trained on: {data['dataset']}, {data['root'] or 'embedded'}, {data['train_images']:,} images, "
        f"{report.held_out:,} of which chose learning rate, weight decay and epoch",
        f"- Images: {data['transform']}",
        f"- Test accuracy: {accuracy} % (Wilson's 95 % interval), {data['test_images']:,} images",
        f"- Training: {spec.optimizer}, lr {spec.lr:g}, weight decay {spec.weight_decay:g}, seed {spec.seed}, epoch "
        f"{result.best_epoch} of {report.sweep.epochs}",
        f"- Command: `{report.command}`",
        f'- Opens with: `visionattn.probe.report.load_head("{path.name}")`',
        "",
    ]
    _write(path.with_suffix(".md"), "\n".join(card))


def load_head(file: str | Path) -> Head:
    """Open a head that `visionattn probe` wrote: pooling, batch norm and classifier, in evaluation.

    Its `forward` takes the tokens (B, N, D) that its `pooling.tokens` names and gives logits (B, K).

    Args:
        file: A .safetensors file of the folder `heads`.

    Raises:
        CheckpointError: There is no such file, or it is no head.
    """
    if not Path(file).is_file():
        raise CheckpointError(f"There is no file {file}.")
    try:
        with safe_open(str(file), "pt") as content:
            facts = json.loads((content.metadata() or {})["visionattn_head"])
            state: dict[str, Tensor] = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        layer = facts["layer"]
        with torch.random.fork_rng(devices=[]):
            pooling = create_pooling(facts["pooling"], layer["dim"], tuple(layer["grid"]))
            head = Head(pooling, len(facts["classes"]))
        head = head.to(state["classifier.weight"].dtype)
        head.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file} is no head that `visionattn probe` wrote: {error}") from error
    return head.eval()
