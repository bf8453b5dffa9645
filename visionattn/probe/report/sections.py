"""Sections of a probing report: text, tables and the points of curves, independent of the output format."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict

from visionattn.page import CurvePoint, Curves, Section
from visionattn.probe.classes import ClassScore
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.knn import Neighbours
from visionattn.probe.pixels import SIDE, PixelHead
from visionattn.probe.report.report import Report, dataset_name, percent
from visionattn.probe.statistics import FEWEST_DRAWS, bootstrap_interval, share_interval, wilson_interval

__all__ = ["CurvePoint", "Curves", "Section", "make_sections"]


_SHOWN_CLASSES = 50


def make_sections(report: Report) -> list[Section]:
    """All sections of the report, in order."""
    data, backbone, reference = report.data, report.backbone, report.reference()
    seconds = ", ".join(f"{name} {value:,.1f} s" for name, value in report.seconds.items())
    sections = [
        Section(
            f"{backbone['name']} on {dataset_name(data)}",
            [
                f"Frozen weights: {backbone['weights']}, SHA-256 {backbone['sha256'][:16]}, "
                f"{backbone['parameters'] / 1e6:,.2f} million parameters. {data['train_images']:,} training images, "
                f"{report.held_out:,} of which held out for selection, and {data['test_images']:,} test images of "
                f"{len(report.classes):,} classes, {data['transform']}.",
                f"{len(report.sweep.heads)} heads trained together for {report.sweep.epochs} epochs. Time: {seconds}.",
                report.summary(),
            ],
        ),
        Section(
            "Heads",
            [
                "The best head of each pooling and layer by accuracy on the held-out images, on which its epoch was "
                "selected too. Brackets are 95 % intervals: Wilson's for accuracies, bootstrapped over images for the "
                "negative log-likelihood (NLL in nats, at the selected epoch), Student's on the logit scale over at "
                f"least {FEWEST_DRAWS} seeds. Parameters are those of pooling and classifier. Standardised k-NN "
                "compares channels normalised over the training images. Rows of pixels use no backbone: each image is "
                f"averaged to {SIDE} x {SIDE} pixels, with the settings of the heads."
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
            Section(
                f"{report.name(reference)} compared with the others",
                [
                    "Paired on the same test images: its accuracy minus the other's with the bootstrapped 95 % "
                    "interval, and McNemar's exact test, without and with Holm's correction for the number of tests."
                ],
                table,
            )
        )
    if scores := report.class_scores():
        sections.append(_classes_section(report, scores))
    if len(report.layers) > 1:
        series: dict[str, list[CurvePoint]] = {}
        for entry in report.neighbours:
            pair = entry.result.chosen
            series.setdefault(entry.method, []).append(CurvePoint(entry.layer, pair.accuracy, pair.interval))
        for result in report.sweep.chosen:
            if result.best is not None:
                point = CurvePoint(result.spec.layer, result.best.accuracy, result.best.interval)
                series.setdefault(result.spec.pooling, []).append(point)
        curves = Curves("layers.svg", [layer.name for layer in report.layers], series, "test accuracy, %")
        sections.append(Section("Results by layer", ["Bars are Wilson's 95 % intervals."], curves=curves))
    if report.few_shot:
        sections.append(_few_shot_section(report))
    if report.maps:
        words = (
            "The image as the backbone saw it, then one panel per query, from its smallest attention weight (grey) "
            "over red to its largest (yellow), which is given in units of the uniform weight: at 1.0 x the attention "
            "is uniform."
        )
        sections.append(Section("Attention maps", [words], pictures=report.maps))
    notes = list(report.notes)
    if report.skipped:
        notes.append(f"{len(report.skipped)} images could not be read and were skipped:")
        notes += [f"{entry.part}: {entry.name}: {entry.reason}" for entry in report.skipped]
    if notes:
        sections.append(Section("Notes", notes))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    protocol = ", ".join(f"{key} {value}" for key, value in report.protocol.items())
    again = [f"`{report.command}`", f"{protocol}.", versions]
    if data["root"] and report.layers[0].name.startswith("blocks.") and not backbone.get("given"):
        given = shlex.split(report.command)
        weights = ["--random"] * ("--random" in given)
        if "--checkpoint" in given:
            weights = given[given.index("--checkpoint") :][:2]
        command = shlex.join(["visionattn", "inspect", backbone["name"], *weights, "--images", str(data["root"])])
        again += ["Inspect the attention of the backbone on the same images:", f"`{command}`"]
    sections.append(Section("Reproduction", again))
    return sections


def _classes_section(report: Report, scores: list[ClassScore]) -> Section:
    best = report.best_answers()
    assert best is not None
    table = [["class", "precision, %", "recall, %", "F1, %", "images", "most often confused with"]]
    for score in scores[:_SHOWN_CLASSES]:
        mistake = "" if score.taken_for is None else f"{score.taken_for} ({score.times})"
        shares = map(percent, (score.precision, score.recall, score.f1))
        table.append([score.name, *shares, f"{score.support:,}", mistake])
    columns = zip(*((score.precision, score.recall, score.f1) for score in scores))
    mean = [sum(column) / len(scores) for column in columns]
    table.append(["mean of the classes", *map(percent, mean), f"{sum(score.support for score in scores):,}", ""])
    words = f"Test results of {best.name}, the best by held-out accuracy; the lowest F1 first."
    if len(scores) > _SHOWN_CLASSES:
        words += f" The {_SHOWN_CLASSES} worst of {len(scores):,} classes; classes.csv has all."
    return Section("Results by class", [words], table)


def _heads_table(report: Report) -> list[list[str]]:
    specs = [result.spec for result in report.sweep.heads]
    several = len({spec.seed for spec in specs}) > 1
    table = [["head", "layer", "chosen", "held out, %", "test, %", "test, last epoch, %", "NLL", "parameters"]]
    if several:
        table[0].append("test over seeds, %")
    for entry in report.neighbours:
        pair, layer = entry.result.chosen, report.layers[entry.layer].name
        table.append([*_neighbours_row(report, entry.method, layer, pair), *[""] * several])
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
            row.append(percent(sum(alike) / len(alike), share_interval(alike)) if alike else "–")
        table.append(row)
    if report.pixels is not None:
        for standardized, neighbours in report.pixels.neighbours.items():
            method = "pixels k-NN" + (", standardised" if standardized else "")
            table.append([*_neighbours_row(report, method, "–", neighbours.chosen), *[""] * several])
        if (linear := report.pixels.linear) is not None:
            spec, score = linear.spec, linear.score
            settings = f"lr {spec.lr:g}, decay {spec.weight_decay:g}, epoch {linear.best_epoch}"
            held, accuracy = _held_out(report, linear), percent(score.accuracy, score.interval)
            nll = f"{float(score.nll.mean()):.3f}"
            row = ["pixels linear", "–", settings, held, accuracy, "", nll, f"{linear.parameters:,}"]
            table.append([*row, *[""] * several])
    return table


def _neighbours_row(report: Report, method: str, layer: str, pair: Neighbours) -> list[str]:
    settings, held = f"k {pair.k}, T {pair.temperature:g}", _held_out(report, pair)
    return [method, layer, settings, held, percent(pair.accuracy, pair.interval), "", "", "0"]


def _held_out(report: Report, result: HeadResult | Neighbours | PixelHead) -> str:
    accuracy = result.held_out_accuracy
    if not math.isfinite(accuracy):
        return "–"
    return percent(accuracy, wilson_interval(round(accuracy * report.held_out), report.held_out))


def _few_shot_section(report: Report) -> Section:
    sizes = list(dict.fromkeys(result.size for result in report.few_shot))
    labels = [f"{100 * size:g} %" if isinstance(size, float) else f"{size} per class" for size in sizes]
    series: dict[str, list[CurvePoint]] = {}
    cells: dict[str, dict[float, str]] = {}
    for result in report.few_shot:
        name = result.pooling + (f" at {result.layer}" if len(report.layers) > 1 else "")
        series.setdefault(name, []).append(CurvePoint(sizes.index(result.size), result.mean, result.interval))
        cells.setdefault(name, {})[result.size] = percent(result.mean, result.interval)
    table = [["head", *labels], *([name, *(row.get(size, "–") for size in sizes)] for name, row in cells.items())]
    draws = max(len(result.accuracies) for result in report.few_shot)
    sure = (
        ", with Student's 95 % interval on the logit scale"
        if draws >= FEWEST_DRAWS
        else f"; fewer than {FEWEST_DRAWS} have no interval"
    )
    words = (
        f"Test accuracy in %, mean of {draws} draws of training images{sure}. Learning rate and weight decay are those "
        "selected with the whole training set; no image is held out, and the last epoch is used."
    )
    curves = Curves("few_shot.svg", labels, series, "test accuracy, %")
    return Section("Few training images", [words], table, curves)
