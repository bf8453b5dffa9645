"""What each pooling costs: parameters, multiply-accumulates, and the time of a training step over frozen tokens.

    python -m benchmarks.probe.probe_poolings [--device cuda] [--batch-size 16] [--repeats 7]

All poolings get the same tokens, those of a ViT-B/16 (196 patches of width 768), and give the gradients of their
parameters for the same cotangent; all take turns in every round. `ratio` is the time of `aim`, multi-head
attention with one query, over the pooling's: above 1 is faster. Writes results/probe_poolings.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.cost import count_macs
from visionattn.probe import POOLINGS, create_pooling

GRID, DIM = (14, 14), 768
BASELINE = "aim"


def names() -> list[str]:
    """Every pooling that has parameters; efficient probing with 8, 16 and 32 queries."""
    others = [name for name in POOLINGS if name not in ("cls", "gap", "ep", "ep_all", "esimpool")]
    return ["ep_8", "ep_16", "ep_32", "esimpool", *others]


def step(pooling: torch.nn.Module, tokens: torch.Tensor, cotangent: torch.Tensor) -> None:
    pooling(tokens).backward(cotangent)


def measure(
    poolings: list[str], dim: int, grid: tuple[int, int], batch_size: int, device: str, repeats: int, baseline: str
) -> dict[str, dict[str, str]]:
    """Give the columns parameters, mega_macs, median_ms, iqr_ms and ratio of each pooling."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randn(batch_size, grid[0] * grid[1], dim, device=device)
    costs, steps = {}, {}
    for name in poolings:
        pooling = create_pooling(name, dim, grid, device=device)
        parameters = sum(parameter.numel() for parameter in pooling.parameters())
        macs = count_macs(pooling, (grid[0] * grid[1], dim))
        costs[name] = {"parameters": str(parameters), "mega_macs": f"{macs / 1e6:.1f}"}
        cotangent = torch.randn(batch_size, pooling.out_dim, device=device)
        call: Callable[[], None] = partial(step, pooling, tokens, cotangent)
        steps[name] = call
    times = paired_milliseconds(steps, device, repeats, warm_up=1)
    return {name: {**costs[name], **columns} for name, columns in summarize(times, baseline).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    rows = [
        {
            "pooling": name,
            **columns,
            "batch": args.batch_size,
            "tokens": f"{GRID[0] * GRID[1]}x{DIM}",
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            **environment(args.device),
        }
        for name, columns in measure(names(), DIM, GRID, args.batch_size, args.device, args.repeats, BASELINE).items()
    ]
    write_rows(RESULTS / "probe_poolings.csv", rows)
    for row in rows:
        print(*(row[key] for key in ("pooling", "parameters", "mega_macs", "median_ms", "ratio")))


if __name__ == "__main__":
    main()
