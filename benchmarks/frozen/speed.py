"""Time of sparse attention compared with PyTorch's own, on one thread of a CPU: selection included, in paired rounds.

    python -m benchmarks.frozen.speed [--sides 32 64 128] [--repeats 5]

Parts: `layer`, attention alone with three heads of 64 channels; `model`, the shipped micro ViT, with patches of 4 x 4
pixels. Budget 0.125; tiles of 8 x 8 queries and 4 x 4 keys. The column `ratio` is the time of dense
attention divided by the row's. Writes results/frozen_speed.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.frozen import UnderPolicy
from visionattn.frozen.calls import Call
from visionattn.frozen.policies import Policy, Pooled, Strided, TailOnly, Window
from visionattn.frozen.using import attend

OUTPUT = RESULTS / "frozen_speed.csv"
POLICIES: dict[str, Policy] = {
    "strided": Strided(tail=False),
    "window": Window(),
    "pooled": Pooled(),
    "tail_only": TailOnly(),
}
HEADS, WIDTH = 3, 64
LARGEST_IMAGE = 64  # tokens per side: the whole model has eight layers


def layer(side: int) -> dict[str, Callable[[], Tensor]]:
    """Calls of one attention, by policy."""
    q, k, v = torch.randn(3, 1, HEADS, side * side, WIDTH).unbind(0)

    def call(policy: Policy) -> Callable[[], Any]:
        return lambda: attend(policy, Call("layer", 0, q, k, v, WIDTH**-0.5, None, (side, side), 0, {}))

    calls = {name: call(policy) for name, policy in POLICIES.items()}
    return {"dense": lambda: F.scaled_dot_product_attention(q, k, v), **calls}


def model(side: int) -> dict[str, Callable[[], Tensor]]:
    """Calls of the whole model, by policy."""
    dense = timm.create_model("va_minimal_vit_micro_patch4_32", pretrained=True, num_classes=0).eval()
    images = torch.randn(1, 3, 4 * side, 4 * side)
    models = {name: UnderPolicy(dense, policy) for name, policy in POLICIES.items()}
    return {"dense": lambda: dense(images), **{name: (lambda m=m: m(images)) for name, m in models.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 64, 128], help="tokens per side")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for part, build in (("layer", layer), ("model", model)):
        for side in args.sides:
            if part == "model" and side > LARGEST_IMAGE:
                continue
            with torch.inference_mode():
                times = paired_milliseconds(build(side), "cpu", args.repeats, warm_up=1)
            for name, columns in summarize(times, "dense").items():
                rows.append({"part": part, "tokens": side * side, "policy": name, **columns, **environment("cpu")})
                print(*list(rows[-1].values())[:6], sep=" | ", flush=True)
    write_rows(OUTPUT, rows)


if __name__ == "__main__":
    main()
