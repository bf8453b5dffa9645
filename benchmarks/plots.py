"""Write the documentation's plots, docs/results/*.svg, from the CSV files in results/.

    pip install matplotlib
    python -m benchmarks.plots

Each file says in its first lines which rows it was drawn of: a test fails while they differ from the CSV.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

from benchmarks.report import RESULTS, read_rows
from visionattn.files import atomic_path

PLOTS = RESULTS.parent / "docs" / "results"
OURS, OTHERS = "#3949ab", "#757575"
CONTROLS = ("strided", "random")
COLOURS = {"operator": OURS, "sdpa on gathered windows": "#00796b", "timm": OTHERS}
HEADS = {
    "k-NN class": "k-NN, class token", "k-NN mean": "k-NN, mean token", "cls": "linear, class token",
    "gap": "linear, mean token", "simpool": "SimPool", "abmilp": "ABMILP", "cae": "CAE", "coca": "CoCa",
    "jepa": "V-JEPA", "aim": "AIM", "ep_8": "efficient probing, 8 queries", "ep_32": "efficient probing, 32 queries",
}  # fmt: skip

Rows = list[dict[str, str]]


def _rows(name: str, *columns: str, **cells: str) -> Rows:
    """The columns of the rows with these cells."""
    found = [row for row in read_rows(RESULTS / f"{name}.csv") if all(row[key] == cells[key] for key in cells)]
    return [{column: row[column] for column in columns} for row in found]


def upscaling() -> Rows:
    return _rows("span_psnr", "model", "psnr_y", "parameters", scale="4", set="Set14")


def draw_upscaling(rows: Rows, axes: Any) -> None:
    rows = sorted(rows, key=lambda row: float(row["psnr_y"]))
    labels = []
    for place, row in enumerate(rows):
        ours, count = "shipped" in row["model"], int(row["parameters"])
        name = row["model"].removesuffix(", shipped") if ours or not count else row["model"].partition("_")[2]
        labels.append(f"{name}, {count / 1000:.0f} k" if count else name)
        axes.plot(float(row["psnr_y"]), place, "o", color=OURS if ours else OTHERS)
    axes.set_yticks(range(len(rows)), labels)
    axes.set(xlabel="PSNR on Y in dB, Set14 ×4; names with their parameters", xlim=(25.8, 28.8))


def halo() -> Rows:
    columns = ("case", "implementation", "median_ms", "peak_mib")
    return _rows("halo_attention", *columns, **{"part": "growth", "pass": "inference"})


def draw_halo(rows: Rows, axes: Any) -> None:
    for name, colour in COLOURS.items():
        found = [row for row in rows if row["implementation"] == name]
        sides = [int(row["case"].partition(",")[0].rpartition("x")[2]) for row in found]
        axes.plot(sides, [float(row["peak_mib"]) for row in found], "o-", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="side of the map in pixels", ylabel="peak memory in MiB")
    axes.set_xticks(sides, sides)
    axes.minorticks_off()
    axes.legend(frameon=False)


def probing() -> Rows:
    cells = {"backbone": "micro ViT, masked autoencoder", "data": "cifar10", "train_images": "20000"}
    rows = _rows("probe_evidence", "head", "accuracy", "low", "high", **cells)
    first = {row["head"]: row for row in reversed(rows)}
    return [first[head] for head in HEADS]


def draw_probing(rows: Rows, axes: Any) -> None:
    rows = sorted(rows, key=lambda row: float(row["accuracy"]))
    for place, row in enumerate(rows):
        low, accuracy, high = (float(row[key]) for key in ("low", "accuracy", "high"))
        colour = OURS if row["head"].startswith("ep_") else OTHERS
        axes.errorbar(accuracy, place, xerr=[[accuracy - low], [high - accuracy]], fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(rows)), [HEADS[row["head"]] for row in rows])
    axes.set(xlabel="accuracy in percent, with 95 % intervals; CIFAR-10, frozen micro ViT")


def policies() -> Rows:
    columns = ("backbone", "policy", "error", "error_low", "error_high")
    rows = _rows("frozen_policies", *columns, part="photographs", tail="False", budget="0.1250")
    return [row for row in rows if row["policy"] != "dense"]


def draw_policies(rows: Rows, axes: Any) -> None:
    means = {row["policy"]: 0.0 for row in rows}
    for row in rows:
        means[row["policy"]] += float(row["error"])
    names = sorted(means, key=lambda name: -means[name])
    for backbone, marker in zip(dict.fromkeys(row["backbone"] for row in rows), "osD"):
        for row in (row for row in rows if row["backbone"] == backbone):
            low, error, high = (float(row[key]) for key in ("error_low", "error", "error_high"))
            colour = OTHERS if row["policy"] in CONTROLS else OURS
            place = names.index(row["policy"])
            axes.errorbar(error, place, xerr=[[error - low], [high - error]], fmt=marker, color=colour, capsize=3)
        axes.plot([], [], marker, color="black", label=backbone)
    axes.set_yticks(range(len(names)), [f"{name} (control)" if name in CONTROLS else name for name in names])
    axes.set(xlabel="relative error of the features, one key in eight, with 95 % intervals", xlim=(0, None))
    axes.legend(frameon=False, title="backbone")


def searching() -> Rows:
    return _rows("search_scale", "images", "kind", "recall_at_10", "median_ms")


def draw_searching(rows: Rows, axes: Any) -> None:
    for row in rows:
        count = int(row["images"])
        where = float(row["median_ms"]), 100 * float(row["recall_at_10"])
        axes.plot(*where, "o" if count >= 10**6 else "s", color=OTHERS if row["kind"] == "exact" else OURS)
        label = f"{row['kind']}, {count:,}"
        axes.annotate(label, where, xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlim=(0.3, 400), ylim=(97, 100.4), xlabel="ms per query, 1 thread")
    axes.set(ylabel="of the 10 nearest found, percent")


ALL: dict[str, tuple[Callable[[], Rows], Callable[[Rows, Any], None]]] = {
    "upscaling": (upscaling, draw_upscaling),
    "halo": (halo, draw_halo),
    "probing": (probing, draw_probing),
    "policies": (policies, draw_policies),
    "search": (searching, draw_searching),
}


def digest(name: str) -> str:
    """Of the rows of a plot, which its file carries."""
    return hashlib.sha256(json.dumps(ALL[name][0]()).encode()).hexdigest()[:16]


def main() -> None:
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "visionattn", "axes.spines.top": False, "axes.spines.right": False}
    PLOTS.mkdir(exist_ok=True)
    for name, (rows, draw) in ALL.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        draw(rows(), axes)
        axes.grid(alpha=0.25)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": digest(name)})
        plt.close(figure)
        with atomic_path(PLOTS / f"{name}.svg") as temporary:
            temporary.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


if __name__ == "__main__":
    main()
