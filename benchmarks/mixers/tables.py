"""The documentation's table of mixers, made of the classes themselves."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import markdown
from visionattn.mixers import MIXERS

DIM, HEADS = 192, 3
SHOWN = ("cross", "prefix", "mask", "bias", "script", "onnx")


def mixers() -> str:
    """Summary, limit, parameters and multiply-accumulates of a layer of ViT-Tiny, and what each mixer supports."""
    head = ["name", "mixing", "equals softmax attention with", "own parameters", "M MACs, N = 196", "N = 3136"]
    body = []
    for name, mixer in MIXERS.items():
        layer = mixer(DIM, HEADS, device="meta")
        summary = (mixer.__doc__ or "").partition("\n")[0].partition(" (")[0].rstrip(".")
        marks = ["yes" if feature in mixer.supports else "" for feature in SHOWN]
        costs = [f"{layer.macs(n) / 1e6:,.1f}" for n in (196, 3136)]
        body.append([f"`{name}`", summary, mixer.limit, f"{layer.extra_parameters():+,}", *costs, *marks])
    return markdown([*head, *SHOWN], body)


TABLES: dict[str, Callable[[], str]] = {"mixers": mixers}
