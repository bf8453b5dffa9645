"""Text, tables and plots of a comparison of backbones, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from visionattn.errors import DataError, InputError, shorten
from visionattn.files import read_json
from visionattn.page import Section, write_pages, write_table, write_text
from visionattn.probe.comparison import Comparison, PairedDifference
from visionattn.probe.report.report import dataset_name, percent
from visionattn.probe.report.scatter import ScatterPoint, draw_scatter
from visionattn.probe.statistics import Interval

__all__ = ["check_comparison", "comparison_sections", "write_comparison"]

FILE = "comparison.json"
_SHOWN_CLASSES = 50
_PICTURES = {
    "macs": ("accuracy_macs.svg", 1e9, "multiply-accumulates per image, billions"),
    "milliseconds": ("accuracy_ms.svg", 1.0, "milliseconds per image"),
}


def check_comparison(folder: Path, comparison: Comparison, overwrite: bool) -> None:
    """Check that no comparison of other reports would be replaced.

    Raises:
        InputError: The folder contains one, or a file that is not a comparison, and `overwrite` is false.
    """
    file = folder / FILE
    if overwrite or not file.exists():
        return
    way = "Use --overwrite to replace it, or --output to choose another folder."
    try:
        found = read_json(file, {"plan": str})
    except DataError as error:
        raise InputError(f"{shorten(folder)} contains a comparison that cannot be read: {error} {way}") from error
    if found["plan"] != comparison.plan:
        raise InputError(f"{shorten(folder)} contains a comparison of other reports. {way}")


def write_comparison(comparison: Comparison, folder: str | Path) -> None:
    """Write `comparison.html`, `.md`, `.json` and `.csv` with their plots, each completely or not at all.

    Raises:
        StorageError: A file could not be written.
    """
    folder = Path(folder)
    write_pages(comparison_sections(comparison), folder, "comparison")
    write_table(comparison.rows(), folder / "comparison.csv")
    content = json.dumps(comparison.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / FILE, content + "\n")


def comparison_sections(comparison: Comparison) -> list[Section]:
    """All sections of a comparison, in order."""
    data, judged = comparison.data, comparison.judged
    sections = [
        Section(
            f"{len(judged)} backbones on {dataset_name(data)}",
            [
                f"{data['train_images']:,} training images, {data['test_images']:,} test images of "
                f"{len(judged[0].report['classes']):,} classes. Each backbone is frozen and evaluated with the head or "
                "k-NN that has the highest accuracy on held-out training images.",
                comparison.summary(),
            ],
        ),
        _accuracy_section(comparison),
        _cost_section(comparison),
        *_picture_sections(comparison),
        _tests_section("Paired tests", comparison.tests()),
    ]
    if neighbours := comparison.tests(neighbours=True):
        sections.append(_tests_section("Paired tests: k-NN", neighbours))
    sections.append(_methods_section(comparison))
    if all(one.report["classes_of_best"] for one in judged):
        sections.append(_classes_section(comparison))
    if comparison.notes:
        sections.append(Section("Notes", comparison.notes))
    commands = [f"`{one.report['command']}`" for one in judged]
    return [*sections, Section("Reproduction", commands)]


def _accuracy_section(comparison: Comparison) -> Section:
    table = [["backbone", "head or k-NN", "test, %", "difference from the best, points", "p, Holm", "k-NN, %"]]
    for row in comparison.rows():
        difference, neighbours = "–", row["neighbours_accuracy"]
        if row["difference"] is not None:
            difference = percent(row["difference"], (row["difference_low"], row["difference_high"]))
        table.append(
            [
                row["backbone"],
                row["head"],
                percent(row["accuracy"], (row["accuracy_low"], row["accuracy_high"])),
                difference,
                "–" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
                "–" if neighbours is None else percent(neighbours),
            ]
        )
    words = (
        "Brackets are 95 % intervals: Wilson's for accuracies, and bootstrapped over the test images, which are the "
        "same for all, for differences from the best. p is McNemar's exact test with Holm's correction for all pairs. "
        "The column k-NN shows the k-NN with the highest held-out accuracy."
    )
    return Section("Accuracy", [words], table)


def _cost_section(comparison: Comparison) -> Section:
    table = [["backbone", "pixels", "MACs, G", "ms", "parameters, M", "weights, MB", "Pareto front of"]]
    for row in comparison.rows():
        ms = row["milliseconds"]
        fronts = [name for name, cost in (("MACs", "macs"), ("ms", "milliseconds")) if row[f"front_{cost}"]]
        table.append(
            [
                row["backbone"],
                f"{row['image_size']}",
                f"{row['macs'] / 1e9:.3g}",
                "–" if ms is None else f"{ms:.3g} [{row['milliseconds_low']:.3g}, {row['milliseconds_high']:.3g}]",
                f"{row['parameters'] / 1e6:.3g}",
                f"{row['bytes'] / 1e6:.3g}",
                " and ".join(fronts) or "–",
            ]
        )
    words = "Costs of the backbone without head. On a Pareto front, no cheaper backbone is at least as accurate."
    if comparison.timings:
        rounds = min(timing.rounds for timing in comparison.timings.values())
        words += (
            f" Times are for a single image: median and quartiles of at least {rounds} rounds in which the backbones "
            f"took turns, on {comparison.device}."
        )
    return Section("Cost", [words], table)


def _picture_sections(comparison: Comparison) -> list[Section]:
    sections = []
    for cost, (file, unit, across) in _PICTURES.items():
        points = [
            ScatterPoint(
                row["backbone"],
                row[cost] / unit,
                row["accuracy"],
                Interval(row["accuracy_low"], row["accuracy_high"]),
                row[f"front_{cost}"],
                number,
            )
            for number, row in enumerate(comparison.rows())
            if row[cost]
        ]
        if points:
            words = "The dashed line is the Pareto front; bars are 95 % intervals."
            title = "Accuracy against multiply-accumulates" if cost == "macs" else "Accuracy against time"
            sections.append(Section(title, [words], drawings=[(file, draw_scatter(points, across))]))
    return sections


def _tests_section(title: str, tests: Sequence[PairedDifference]) -> Section:
    table = [["first", "second", "first minus second, points", "p, McNemar", "p, Holm"]]
    for test in tests:
        difference = percent(test.difference, test.interval)
        table.append([test.one, test.other, difference, f"{test.p:.2g}", f"{test.p_holm:.2g}"])
    return Section(title, [], table)


def _methods_section(comparison: Comparison) -> Section:
    methods = list(dict.fromkeys(method for one in comparison.judged for method in one.correct))
    table = [["head or k-NN", *(one.name for one in comparison.judged)]]
    for method in methods:
        cells = [percent(*one.accuracy(method)) if method in one.correct else "–" for one in comparison.judged]
        table.append([method, *cells])
    return Section("Results by head", ["Test accuracy in %, with Wilson's 95 % intervals."], table)


def _classes_section(comparison: Comparison) -> Section:
    scores = [{one["name"]: one for one in each.report["classes_of_best"]} for each in comparison.judged]
    names = [name for name in scores[0] if all(name in one for one in scores)]
    names.sort(key=lambda name: sum(one[name]["f1"] for one in scores))
    table = [["class", "images", *(one.name for one in comparison.judged)]]
    for name in names[:_SHOWN_CLASSES]:
        table.append([name, f"{scores[0][name]['support']:,}", *(percent(one[name]["f1"]) for one in scores)])
    words = "F1 in %, for each backbone with its best head or k-NN; the classes that are hardest for all come first."
    if len(names) > _SHOWN_CLASSES:
        words += f" The {_SHOWN_CLASSES} hardest of {len(names):,}."
    return Section("Results by class", [words], table)
