"""The documentation's tables of frozen backbones: sparse attention, pruning, sinks, occlusion."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import markdown, plain
from benchmarks.report import RESULTS, read_rows

ORDER = ("micro", "sharp", "supervised", "rotary")


def errors() -> str:
    """Error of every policy at 4,096 tokens, without and with the tail, a column pair a backbone."""
    rows = [row for row in read_rows(RESULTS / "frozen_policies.csv") if row["part"] == "photographs"]
    if not rows:
        return "Not measured yet.\n"
    backbones = [name for name in ORDER if any(row["backbone"] == name for row in rows)]
    by_key = {(row["backbone"], row["policy"], row["tail"]): row for row in rows}
    policies = [name for name in dict.fromkeys(row["policy"] for row in rows) if name != "dense"]
    head = ["policy", "attention cost"]
    head += [f"{name}{tail}" for name in backbones for tail in ("", " + tail")]
    body = []
    for policy in policies:
        first = by_key.get((backbones[0], policy, "True")) or by_key[backbones[0], policy, "False"]
        cells = [f"`{policy}`", f"{float(first['attention']):.2f}"]
        for backbone in backbones:
            for tail in ("False", "True"):
                row = by_key.get((backbone, policy, tail))
                half = (float(row["error_high"]) - float(row["error"])) if row else 0.0
                cells.append(f"{float(row['error']):.3f} ± {half:.3f}" if row else "")
        body.append(cells)
    return markdown(head, body)


def accuracy() -> str:
    """k-NN accuracy of every policy on product photographs, the better of both tails not chosen: both are shown."""
    rows = [row for row in read_rows(RESULTS / "frozen_policies.csv") if row["part"] == "products"]
    if not rows:
        return "Not measured yet.\n"
    head = ["backbone", "policy", "tail", "attention cost", "error", "k-NN %", "95 % interval"]
    body = [
        [
            row["backbone"],
            f"`{row['policy']}`",
            {"True": "yes", "False": ""}[row["tail"]],
            f"{float(row['attention']):.2f}",
            f"{float(row['error']):.3f}",
            f"{100 * float(row['accuracy']):.1f}",
            f"{100 * float(row['accuracy_low']):.1f} to {100 * float(row['accuracy_high']):.1f}",
        ]
        for row in rows
    ]
    return markdown(head, body)


def router() -> str:
    """Score of the router and the labels, and what each gains over a fixed budget of equal cost, over seeds."""
    rows = read_rows(RESULTS / "frozen_router.csv")
    if not rows:
        return "Not measured yet.\n"
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        scores.setdefault((row["backbone"], row["name"]), []).append(float(row["score"]))
    head = ["backbone", "budgets by", "score", "gain over a fixed budget of equal cost"]
    body = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        for name, control in (("router", "fixed"), ("labels", "fixed at the labels' cost")):
            found = scores[backbone, name]
            gains = [one - other for one, other in zip(found, scores[backbone, control], strict=True)]
            # Adding zero turns the zero that rounding leaves below zero into a positive one.
            mean, low, high = (round(value, 4) + 0.0 for value in (statistics.mean(gains), min(gains), max(gains)))
            body.append([backbone, name, f"{statistics.mean(found):.4f}", f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"])
    return markdown(head, body)


PRUNED_BY = ("merge", "grid", "class", "usage", "random")


def pruning() -> str:
    """Pruned backbones at half and at a quarter: the best scores, the controls, and their paired differences."""
    rows = read_rows(RESULTS / "frozen_pruning.csv")
    if not rows:
        return "Not measured yet.\n"
    head = ["backbone", "pruned", "by", "kept %", "MACs (M)", "error", "k-NN %"]
    head += ["points over grid", "points over random", "points over blocks"]
    body = [
        [
            row["backbone"],
            row["method"],
            f"`{row['score']}`" if row["score"] else "",
            f"{100 * float(row['keep']):.0f}",
            f"{int(row['macs']) / 1e6:.1f}",
            f"{float(row['error']):.3f}",
            f"{100 * float(row['accuracy']):.1f}",
            *(_points(row[f"ahead_of_{name}"]) for name in ("grid", "random", "blocks")),
        ]
        for row in rows
        if row["method"] == "whole" or (float(row["keep"]) <= 0.5 and row["score"] in ("", *PRUNED_BY))
    ]
    return markdown(head, body)


def _points(cell: str) -> str:
    """A difference and its half interval in percentage points, bold where it does not hold 0."""
    if not cell:
        return ""
    difference, half = (100 * float(part) for part in cell.split(" ± "))
    text = f"{difference:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(difference) > half else text


def sinks() -> str:
    """Differences in accuracy, one row per method and control, one column per half of the images."""
    rows = read_rows(RESULTS / "frozen_sinks.csv")
    if not rows:
        return "Not measured yet.\n"
    halves = list(dict.fromkeys(row["half"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        method = "redistribution" if row["method"].startswith("chosen") else row["method"]
        method = "redistribution, single heads" if "heads chosen" in method else method
        against = "model unchanged" if row["against"] == "nothing" else row["against"]
        cells.setdefault((method, against), {})[row["half"]] = _points(f"{row['ahead']} ± {row['half_interval']}")
    head = ["method", "compared with", *(f"half {int(half) + 1}" for half in halves)]
    return markdown(head, ([*key, *(found.get(half, "") for half in halves)] for key, found in cells.items()))


def occlusion() -> str:
    """Agreement of maps with occlusion."""
    rows = read_rows(RESULTS / "frozen_occlusion.csv")
    if not rows:
        return "Not measured yet.\n"
    head = ["map", "r with occlusion", "95 % interval", "deletion", "insertion"]
    body = [
        [
            row["map"],
            f"{float(row['pearson']):.3f}",
            f"{float(row['low']):.3f} to {float(row['high']):.3f}",
            f"{float(row['deletion_map']):.3f}",
            f"{float(row['insertion_map']):.3f}",
        ]
        for row in rows
    ]
    first = rows[0]
    areas = [f"{float(first[f'{name}_saliency']):.3f}" for name in ("deletion", "insertion")]
    body.append(["the saliency itself", "1", "", *areas])
    return markdown(head, body)


TABLES: dict[str, Callable[[], str]] = {
    "frozen_policies": errors,
    "frozen_accuracy": accuracy,
    "frozen_router": router,
    "frozen_speed": lambda: plain("frozen_speed", ratio="speed-up", part="timed"),
    "frozen_pruning": pruning,
    "frozen_sinks": sinks,
    "frozen_occlusion": occlusion,
}
