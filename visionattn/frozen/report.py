"""Files of an inspection: `report.html` and `report.md`, CSV tables, the contact sheet, and a plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from visionattn.errors import InputError, shorten
from visionattn.files import atomic_path
from visionattn.frozen.inspection import Inspection
from visionattn.frozen.sheet import contact_sheet
from visionattn.page import CurvePoint, Curves, Section, write_pages, write_table
from visionattn.probe.statistics import Interval, bootstrap_interval

__all__ = ["PLAN", "check_report", "summary", "write_report"]

PLAN = "plan.json"
LAYERS, POLICIES, PRUNING, OCCLUSION, SHEET = "layers.csv", "policies.csv", "pruning.csv", "occlusion.csv", "maps.jpg"
SHOWN_LAYERS = 4  # on the contact sheet


def check_report(folder: Path, overwrite: bool) -> None:
    """Check that no report of another run would be overwritten.

    Raises:
        InputError: The folder has a report, and `overwrite` is false.
    """
    if (folder / LAYERS).exists() and not overwrite:
        raise InputError(
            f"{shorten(folder)} already contains a report. Use --overwrite to replace it, or choose another folder."
        )


def summary(found: Inspection) -> str:
    """Summary of the inspection in three sentences."""
    layers = found.look.layers
    share = [layer.effective_keys / layer.keys for layer in layers]
    last = _with_interval(found.agreement.mean, found.agreement.interval)
    sharp = "diffuse: no few keys represent all" if min(share) > 0.25 else "sharp in some layers"
    return (
        f"A query attends to {min(share):.0%} to {max(share):.0%} of the keys, depending on the layer ({sharp}). The "
        f"column that receives the most attention has {max(layer.received for layer in layers):.1f} times the uniform "
        f"share. The map of {layers[-1].layer} correlates with occlusion by r = {last}, the mean over layers by "
        f"{_with_interval(*found.mean_map_correlation)}."
    )


def _with_interval(mean: float, interval: Interval) -> str:
    return f"{mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def write_report(found: Inspection, folder: Path) -> None:
    """Write all files, each completely or not at all, and remove files of an earlier report that are not rewritten.

    Raises:
        StorageError: A file could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in (POLICIES, PRUNING, PLAN, SHEET):
        (folder / file).unlink(missing_ok=True)
    write_table(found.rows(), folder / LAYERS)
    write_table(_occlusion_rows(found), folder / OCCLUSION)
    if found.policies:
        write_table([_plain(row) for row in found.policies], folder / POLICIES)
        assert found.plan is not None
        found.plan.save(folder / PLAN)
    if found.curves:
        write_table([_plain(row) for row in found.curves], folder / PRUNING)
    if found.pictures:
        _write_sheet(found, folder / SHEET)
    write_pages(_sections(found), folder)


def _write_sheet(found: Inspection, file: Path) -> None:
    count = len(found.look.layers)
    chosen = sorted({round((number + 1) * count / SHOWN_LAYERS) - 1 for number in range(SHOWN_LAYERS)} - {-1})
    sheet = contact_sheet(
        found.pictures,
        [found.look.maps[index] for index in chosen],
        [found.look.sinks[index] for index in chosen],
        [found.look.layers[index].layer for index in chosen],
        found.look.grid,
    )
    with atomic_path(file) as temporary:
        sheet.save(temporary, format="JPEG", quality=90)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("plan", "correct")}


def _occlusion_rows(found: Inspection) -> list[dict[str, Any]]:
    one = found.agreement
    return [
        {
            "image": found.names[number],
            "pearson": float(one.pearson[number]),
            **{f"deletion_{name}": float(values[number]) for name, values in one.deletion.items()},
            **{f"insertion_{name}": float(values[number]) for name, values in one.insertion.items()},
        }
        for number in range(len(one.pearson))
    ]


def _sections(found: Inspection) -> list[Section]:
    height, width = found.look.grid
    classes = f" of {len(found.classes)} classes" if found.classes else ""
    sections = [
        Section(
            f"Attention of {found.name}",
            [
                f"Frozen weights: {found.source}. {len(found.names)} images{classes}, {found.size} x {found.size} "
                f"pixels, {height} x {width} patches. {found.look.reached}.",
                summary(found),
            ],
        ),
        Section("Layers", [_WHAT_LAYERS.format(whose=_whose(found))], _layer_table(found)),
        Section("Maps and occlusion", _occlusion_words(found), _occlusion_table(found)),
    ]
    if found.pictures:
        caption = f"{_whose(found)[0].upper()}{_whose(found)[1:]}; frames mark its outliers"
        sections.append(Section("Contact sheet", pictures=[(SHEET, caption)]))
    if found.policies:
        sections.append(Section("Sparse attention", _policy_words(found), _policy_table(found)))
    if found.curves:
        sections.append(Section("Pruned models", _WHAT_CURVES, _curve_table(found), _curves(found)))
    if found.skipped:
        left_out = [f"Skipped: {shorten(name)}: {reason}" for name, reason in found.skipped]
        sections.append(Section("Notes", left_out))
    return sections


_WHAT_LAYERS = (
    "Means over images, heads and queries. Effective keys: exp of the entropy. Received: largest attention received by "
    "a column, in units of the uniform share, and how often this column is a prefix token. Outliers: tokens beyond "
    "Tukey's fence of the {whose}. Received sinks: tokens with more than 10 times the uniform share. Channel sinks: "
    "tokens with more than 10 % of their energy in one channel. Tiles: share of the key tiles that hold 90 % of the "
    "attention. Overlap: share of the selected tiles that the best earlier layer selects too. r: correlation of the "
    "layer's map with occlusion."
)
_WHAT_CURVES = [
    "Relative error of the image's vector with respect to the whole model, and leave-one-out k-NN accuracy with "
    "Wilson's interval where classes are known. Controls to beat at equal cost: dropped blocks, tokens of a regular "
    "grid, and random tokens or heads."
]


def _whose(found: Inspection) -> str:
    return "attention of the class token" if found.look.has_class else "attention that a patch receives"


def _number(value: float, form: str = ".1f") -> str:
    return "" if math.isnan(value) else format(value, form)


def _layer_table(found: Inspection) -> list[list[str]]:
    table = [
        ["layer", "keys", "effective keys", "received", "by a prefix token", "class share", "outliers",
         "received sinks", "channel sinks", "largest channel", "tiles", "overlap", "r with occlusion"]
    ]  # fmt: skip
    for one, correlation in zip(found.look.layers, found.correlations(), strict=True):
        table.append(
            [
                one.layer, str(one.keys), f"{one.effective_keys:.1f}", f"{one.received:.1f}",
                f"{one.received_by_class:.0%}", _number(one.class_share, ".1%"), f"{one.outliers:.1f}",
                f"{one.received_sinks:.1f}", _number(one.channel_sinks), _number(one.channel_share, ".0%"),
                f"{one.tiles:.0%}", _number(one.overlap, ".0%"), _with_interval(*correlation),
            ]
        )  # fmt: skip
    return table


def _occlusion_words(found: Inspection) -> list[str]:
    one = found.agreement
    what = "the divergence of the class probabilities" if found.logits else "one minus the cosine of the features"
    return [
        f"Correlation of the map of {found.look.layers[-1].layer} with occlusion of patches on {len(one.pearson)} "
        f"images: r = {_with_interval(one.mean, one.interval)}; of the mean of the maps over layers: r = "
        f"{_with_interval(*found.mean_map_correlation)}. Intervals are bootstrapped over images. The score of a mask "
        f"is {what}. A map that explains the output has a smaller deletion area and a larger insertion area than "
        "random order; the saliency itself is close to the best possible order."
    ]


def _occlusion_table(found: Inspection) -> list[list[str]]:
    one = found.agreement
    table = [["order of patches", "deletion area", "insertion area"]]
    for name in one.deletion:
        cells = []
        for values in (one.deletion[name], one.insertion[name]):
            interval = bootstrap_interval(values)
            cells.append(f"{values.mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        table.append([name, *cells])
    return table


def _policy_words(found: Inspection) -> list[str]:
    plan = found.plan
    assert plan is not None
    control = " It is a control: selection by content has no benefit here." * (plan.policy in ("strided", "random"))
    return [
        "Relative error of the patch features with respect to dense attention, and leave-one-out k-NN accuracy where "
        "classes are known. `strided` and `random` are the controls. Attention: multiply-accumulates of attention and "
        "selection, as a share of those of dense attention.",
        f"{PLAN} contains the plan with the lowest error within the budget: {plan.policy}.{control}",
    ]


def _policy_table(found: Inspection) -> list[list[str]]:
    table = [["policy", "tail", "budget", "M MACs", "attention", "error", "k-NN accuracy"]]
    for row in found.policies:
        tail = "yes" if row["tail"] else ""
        cost = [f"{row['macs'] / 1e6:,.1f}", f"{row['attention']:.0%}"]
        error = f"{row['error']:.4f} [{row['error_low']:.4f}, {row['error_high']:.4f}]"
        table.append([row["policy"], tail, f"{row['budget']:g}", *cost, error, _accuracy(row)])
    return table


def _accuracy(row: dict[str, Any]) -> str:
    if row["accuracy"] is None:
        return ""
    return f"{row['accuracy']:.1%} [{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]"


def _curve_table(found: Inspection) -> list[list[str]]:
    table = [["pruned", "chosen by", "kept", "M parameters", "M MACs", "error", "k-NN accuracy"]]
    for row in found.curves:
        cost = [f"{row['parameters'] / 1e6:,.2f}", f"{row['macs'] / 1e6:,.1f}"]
        name = "nothing" if row["method"] == "whole" else row["method"]
        table.append([name, row["score"], f"{row['keep']:.0%}", *cost, f"{row['error']:.4f}", _accuracy(row)])
    return table


def _curves(found: Inspection) -> Curves:
    """Accuracy, or error without labels, against multiply-accumulates in percent of those of the whole model."""
    rows = found.curves
    known = rows[0]["accuracy"] is not None
    whole = rows[0]["macs"]
    shares = sorted({round(100 * row["macs"] / whole) for row in rows})
    series: dict[str, list[CurvePoint]] = {}
    for row in sorted(rows[1:], key=lambda row: row["macs"]):
        interval = (row["accuracy_low"], row["accuracy_high"]) if known else (math.nan, math.nan)
        point = CurvePoint(
            shares.index(round(100 * row["macs"] / whole)), row["accuracy" if known else "error"], interval
        )
        series.setdefault(f"{row['method']} {row['score']}".strip(), []).append(point)
    what = "k-NN accuracy, %" if known else "error of the vectors"
    return Curves("pruning.svg", [f"{share} %" for share in shares], series, what, percent=known)
