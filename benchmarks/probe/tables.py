"""The documentation's tables of probing."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import machines, markdown, plain, spread
from benchmarks.report import RESULTS, read_rows

# The pages show the heads that decide; the CSV files have all.
HEADS = ("k-NN mean", "cls", "gap", "ep_8", "ep_16", "ep_32", "simpool", "aim", "coca", "jepa")
FEW_SHOT = tuple(f"{name}, 5 a class" for name in ("gap", "ep_32", "aim"))


def probe_sweep() -> str:
    """The time of a sweep as a share of that of its heads one after the other, or of a single head's."""
    rows = [row for row in read_rows(RESULTS / "probe_sweep.csv") if row["share"] and _is_shown(row["case"])]
    if not rows:
        return "Not measured yet.\n"
    head = ["tokens and heads", "compared with", "wall time ratio", "CPU time ratio"]
    keys = ("case", "implementation", "share", "cpu_share")
    return markdown(head, ([row[key] for key in keys] for row in rows)) + f"\n{rows[0]['device']}.\n"


def _is_shown(case: str) -> bool:
    mixed = case.endswith("8 gap, 8 ep_8, 8 ep_16, 8 ep_32") and "196 x 192" not in case
    return mixed or case.endswith("32 gap")


def probe_evidence() -> str:
    """Heads by backbones and data: accuracy with its interval, the best of each column in bold."""
    rows = read_rows(RESULTS / "probe_evidence.csv")
    if not rows:
        return "Not measured yet.\n"
    cases = list(dict.fromkeys((row["backbone"], row["data"]) for row in rows))
    heads = [name for name in dict.fromkeys(row["head"] for row in rows) if name in HEADS + FEW_SHOT]
    cells = {(row["backbone"], row["data"], row["head"]): row for row in rows}
    best = {
        case: max(float(row["accuracy"]) for row in rows if (row["backbone"], row["data"]) == case and row["lr"])
        for case in cases
    }

    def cell(case: tuple[str, str], head: str) -> str:
        row = cells.get((*case, head))
        if row is None:
            return ""
        text = row["accuracy"]
        if row["low"]:  # few draws have no interval
            text += f" ± {(float(row['high']) - float(row['low'])) / 2:.2f}"
        return f"**{text}**" if row["lr"] and float(row["accuracy"]) == best[case] else text

    head = ["head", *(f"{backbone}: {data}" for backbone, data in cases)]
    names = (name.replace(" a class", " images per class") for name in heads)
    return markdown(
        head, ([shown, *(cell(case, name) for case in cases)] for shown, name in zip(names, heads, strict=True))
    )


def probe_evidence_costs() -> str:
    """The pre-trained ViT on CIFAR-10: accuracy with parameters, arithmetic and time."""
    rows = [
        row
        for row in read_rows(RESULTS / "probe_evidence.csv")
        if row["backbone"] == "micro ViT, masked autoencoder" and row["data"] == "cifar10" and row["head"] in HEADS
    ]
    if not rows:
        return "Not measured yet.\n"
    head = ["head", "accuracy %", "gain of EP", "p", "parameters", "MACs (M)", "step ms", "calibration error %"]

    def ahead(row: dict[str, str]) -> str:
        return row["ahead"] and f"{row['ahead']} ({row['ahead_low']} to {row['ahead_high']})"

    body = (
        [
            row["head"],
            f"{row['accuracy']} ({row['low']} to {row['high']})",
            ahead(row),
            row["p_holm"],
            f"{int(row['parameters']):,}",
            row["mega_macs"],
            row["step_ms"],
            row["calibration_error"],
        ]
        for row in rows
    )
    return markdown(head, body) + f"\n{machines(rows)}; seed {rows[0]['seed']}.\n"


def probe_segmentation() -> str:
    """Heads by backbones: mIoU, mean and deviation over seeds, and how far ahead of the linear head."""
    rows = read_rows(RESULTS / "probe_segmentation.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["backbone"], row["head"]), []).append(row)
    body = []
    for (backbone, name), some in groups.items():
        ahead = [100 * float(row["ahead"]) for row in some]
        cells = [backbone, some[0]["grid"], name, f"{int(some[0]['parameters']):,}"]
        for key in ("miou", "boundary_iou", "pixel_accuracy"):
            cells.append(spread([100 * float(row[key]) for row in some], 1))
        words = f"{statistics.median(ahead):+.1f} ({min(ahead):+.1f} to {max(ahead):+.1f})"
        body.append([*cells, "" if name == "linear" else words])
    head = [
        "backbone",
        "grid",
        "head",
        "parameters",
        "mIoU %",
        "boundary mIoU %",
        "pixel accuracy %",
        "gain over linear",
    ]
    return markdown(head, body) + f"\n{machines(rows)}.\n"


def probe_comparison() -> str:
    """Comparison of backbones."""
    rows = read_rows(RESULTS / "probe_comparison.csv")
    if not rows:
        return "Not measured yet.\n"
    head = [
        "backbone",
        "pixels",
        "head",
        "accuracy %",
        "difference to best",
        "p (Holm)",
        "k-NN %",
        "MACs (G)",
        "ms",
        "MB",
    ]

    def percent(row: dict[str, str], name: str) -> str:
        value, low, high = (
            row[key] and f"{100 * float(row[key]):.1f}" for key in (name, f"{name}_low", f"{name}_high")
        )
        return value and f"{value} ({low} to {high})"

    body = (
        [
            row["backbone"],
            row["image_size"],
            row["head"],
            percent(row, "accuracy"),
            percent(row, "difference"),
            row["p_holm"] and f"{float(row['p_holm']):.2g}",
            f"{100 * float(row['neighbours_accuracy']):.1f}",
            f"{float(row['macs']) / 1e9:.3g}",
            f"{float(row['milliseconds']):.3g}",
            f"{float(row['bytes']) / 1e6:.3g}",
        ]
        for row in rows
    )
    return markdown(head, body) + f"\n{machines(rows)}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "probe_poolings": lambda: plain("probe_poolings", ratio="relative speed"),
    "probe_sweep": probe_sweep,
    "probe_evidence": probe_evidence,
    "probe_evidence_costs": probe_evidence_costs,
    "probe_segmentation": probe_segmentation,
    "probe_comparison": probe_comparison,
    "probe_extraction": lambda: plain("probe_extraction", ratio="relative speed", implementation="stored as"),
}
