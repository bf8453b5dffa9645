"""What more attributes cost: the time of embeddings for six of them over that for one, backbone included.

    python -m benchmarks.retrieval.retrieval_cost [--device cuda] [--batch-size 2] [--repeats 9]

Each backbone with each head embeds a batch of images for one attribute, for six, and, as what is to be avoided, for six
one after the other. All take turns in every round. `ratio` is the time for one attribute over the time of
the row: 1 / 1.1 = 0.909 or more is within a tenth. Writes results/retrieval_cost.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch

import visionattn  # noqa: F401  registers the names
from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.cost import count_macs
from visionattn.models.cca import HEADS

BACKBONES = ["vit_tiny_patch16_224", "tf_efficientnet_lite0", "minimal_vit_nano_patch4_32", "halonet_nano_32"]
ATTRIBUTES = 6


def columns(
    backbone: str, heads: list[str], batch_size: int, device: str, repeats: int
) -> dict[tuple[str, str], dict[str, str]]:
    """Head and what is asked -> the columns mega_macs, median_ms, iqr_ms and ratio."""
    found = {}
    for head in heads:
        torch.manual_seed(0)
        arguments = {"attributes": [f"attribute {n}" for n in range(ATTRIBUTES)], "head": head}
        model = timm.create_model(f"va_cca_{backbone}", **arguments, device=device).eval()
        one = timm.create_model(f"va_cca_{backbone}", head=head, device="meta")
        size = model.pretrained_cfg["input_size"]
        images = torch.randn(batch_size, *size, device=device)

        def ask(ids: list[int], model=model, images=images) -> Callable[[], torch.Tensor]:
            conditions = torch.tensor(ids, device=device)
            return torch.inference_mode()(lambda: model(images, conditions))

        alone = [ask([n]) for n in range(ATTRIBUTES)]
        calls: dict[str, Callable] = {
            "one attribute": ask([0]),
            "six attributes": ask([*range(ATTRIBUTES)]),
            "six, one after the other": lambda alone=alone: [call() for call in alone],
        }
        macs = [count_macs(one, size), count_macs(model, size)]
        macs.append(ATTRIBUTES * macs[0])
        rows = summarize(paired_milliseconds(calls, device, repeats, warm_up=1), "one attribute")
        for (asked, row), count in zip(rows.items(), macs):
            found[head, asked] = {"mega_macs": f"{count / 1e6:.1f}", **row}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {
            "backbone": backbone,
            "head": head,
            "asked": asked,
            **row,
            "batch": args.batch_size,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            **environment(args.device),
            "seed": 0,
        }
        for backbone in BACKBONES
        for (head, asked), row in columns(backbone, [*HEADS], args.batch_size, args.device, args.repeats).items()
    ]
    write_rows(RESULTS / "retrieval_cost.csv", rows)
    for row in rows:
        print(*(row[key] for key in ("backbone", "head", "asked", "mega_macs", "median_ms", "ratio")))


if __name__ == "__main__":
    main()
