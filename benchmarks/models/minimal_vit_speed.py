"""Speed-up without projections: time of each minimal ViT compared with the baseline, paired.

    python -m benchmarks.models.minimal_vit_speed [--device cuda]

Each variant at tiny scale is timed at 224 x 224 in inference and in a training step (forward, backward), in turn with
the baseline. Weights that must come out equal are checked first: a variant whose attention differs from its explicit
matrices is not timed.
"""

from __future__ import annotations

import argparse
from functools import partial

import timm
import torch
from torch import Tensor, nn

from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.cost import count_macs, count_parameters
from visionattn.models.minimal_vit import VARIANTS

NAME = "va_minimal_vit_tiny_patch16_224"


def check(model: nn.Module) -> None:
    """Refuse a block whose fast attention is not the one of its matrices."""
    attention = model.blocks[0].attn
    x = torch.randn(2, 50, model.embed_dim, device=next(model.parameters()).device)
    *_, values = attention.project(x)
    mixed = attention.proj((attention.attention_weights(x) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), mixed, rtol=1e-3, atol=1e-4)


def infer(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(images).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    suffixes = {name: "" if name == "baseline" else f"_{name}" for name in VARIANTS}
    models = {name: timm.create_model(NAME + suffix).to(args.device) for name, suffix in suffixes.items()}
    for model in models.values():
        check(model)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    rows = []
    for mode, function in {"inference": infer, "training step": step}.items():
        functions = {name: partial(function, model, images) for name, model in models.items()}
        columns = summarize(paired_milliseconds(functions, args.device, args.repeats), "baseline")
        rows += [
            {
                "variant": name,
                "mode": mode,
                "batch": args.batch,
                "parameters": count_parameters(model),
                "macs": count_macs(model, (3, 224, 224)),
                **columns[name],
                "threads": torch.get_num_threads(),
                **environment(args.device),
            }
            for name, model in models.items()
        ]
    write_rows(RESULTS / "minimal_vit_speed.csv", rows)


if __name__ == "__main__":
    main()
