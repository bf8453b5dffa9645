"""The documentation's tables of mixers: of the classes themselves, of the arena's rows, and of zero-shot swaps."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows
from visionattn.mixers import MIXERS

DIM, HEADS = 192, 3
# Title, measure, setting, and the images of accuracy.
ARENA: tuple[tuple[str, ...], ...] = (
    ("recall, K = 16", "recall", "K=16"),
    ("recall at distance 7", "recall by distance", "r=7"),
    ("recall, 16 x 16 grid, K = 64", "recall on a larger grid", "K=64"),
    ("regression error", "regression error", "L=40"),
    ("digits, equal parameters", "accuracy", "equal parameters", "digits"),
    ("digits, equal MACs", "accuracy", "equal MACs", "digits"),
    ("CIFAR-10 (3,000 images), equal parameters", "accuracy", "equal parameters", "cifar10"),
    ("CIFAR-10 (3,000 images), equal MACs", "accuracy", "equal MACs", "cifar10"),
    ("speed-up over softmax, N = 784", "times faster", "N=784"),
    ("speed-up over softmax, N = 3136", "times faster", "N=3136"),
    ("peak MiB, N = 3136", "MiB", "N=3136"),
)
SHOWN = ("cross", "prefix", "mask", "bias", "script", "onnx")


def mixers() -> str:
    """Summary, limit, parameters and multiply-accumulates of a layer of ViT-Tiny, and what each mixer supports."""
    head = ["mixer", "what it computes", "equals softmax attention with", "extra parameters"]
    head += ["MACs (M), N = 196", "MACs (M), N = 3136"]
    body = []
    for name, mixer in MIXERS.items():
        layer = mixer(DIM, HEADS, device="meta")
        summary = (mixer.__doc__ or "").partition("\n")[0].partition(" (")[0].rstrip(".")
        marks = ["yes" if feature in mixer.supports else "" for feature in SHOWN]
        costs = [f"{layer.macs(n) / 1e6:,.1f}" for n in (196, 3136)]
        body.append([f"`{name}`", summary, mixer.limit, f"{layer.extra_parameters():+,}", *costs, *marks])
    return markdown([*head, *SHOWN], body)


def arena() -> str:
    """Means over seeds, with the lowest and the highest, of what the arena measured on CPUs."""
    rows = [row for row in read_rows(RESULTS / "arena.csv") if not row["device"].startswith("NVIDIA")]
    if not rows:
        return "Not measured yet.\n"
    head = ["mixer", *(title for title, *_ in ARENA)]
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    body = [[f"`{name}`", *(_cell(rows, name, *column) for _, *column in ARENA)] for name in names]
    return markdown(head, body)


def _cell(rows: list[dict[str, str]], name: str, measure: str, setting: str, images: str = "") -> str:
    wanted = (name, measure, setting)
    found = [
        float(row["value"])
        for row in rows
        if (row["mixer"], row["measure"], row["setting"]) == wanted and row["recipe"].endswith(images)
    ]
    if not found:
        return "–"
    digits = 2 if measure in ("ms", "MiB", "times faster") else 3
    mean = f"{statistics.mean(found):,.{digits}f}"
    return mean if len(found) < 2 else f"{mean} ({min(found):,.{digits}f} to {max(found):,.{digits}f})"


def zero_shot() -> str:
    """Feature error and k-NN accuracy with mixers swapped into trained layers, without and with fine-tuning."""
    rows = read_rows(RESULTS / "mixers_zero_shot.csv")
    if not rows:
        return "Not measured yet.\n"
    head = ["mixer", "layers", "fine-tuning steps", "feature error", "k-NN accuracy % (three draws)"]
    body = []
    for row in rows:
        low, mean, high = (f"{100 * float(row[f'knn_{end}']):.1f}" for end in ("lowest", "accuracy", "highest"))
        error = f"{float(row['feature_error']):.2f}"
        body.append([row["mixer"], row["layers"], row["steps"], error, f"{mean} ({low} to {high})"])
    return markdown(head, body)


TABLES: dict[str, Callable[[], str]] = {"mixers": mixers, "arena": arena, "mixers_zero_shot": zero_shot}
