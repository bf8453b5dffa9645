"""Extraction of tokens to disk compared with the bare backbone: `forward_features` over the same batches.

    OMP_NUM_THREADS=1 python -m benchmarks.probe.probe_extraction [--device cpu] [--images 128] [--repeats 9]

Random images are kept in memory, so that only the work of the store is compared: hashing the weights, collating,
splitting and converting tokens, checking them, checksums and files. The column `ratio` is the bare backbone's time over
the extraction's in the same round, its median: the share of the backbone's speed that is left. Writes
results/probe_extraction.csv.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import timm
import torch
from torch.utils.data import TensorDataset

from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import extract

SIZE = 224
IDENTITY = {"model": "random", "transform": "none", "dataset": "random"}


def measure(name: str, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    autocast = torch.bfloat16 if torch.device(args.device).type == "cuda" else None
    model = timm.create_model(name).to(args.device)
    backbone = Backbone(model, image_size=SIZE, autocast=autocast)
    images = torch.randn(args.images, 3, SIZE, SIZE)
    dataset = TensorDataset(images, torch.zeros(args.images, dtype=torch.int64))
    batches = [batch.contiguous(memory_format=backbone.memory_format) for batch in images.split(args.batch_size)]

    def bare() -> None:
        with torch.inference_mode(), torch.autocast(backbone.device.type, autocast, enabled=autocast is not None):
            for batch in batches:
                model.forward_features(batch.to(args.device))

    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def store(precision: str) -> None:
            extract(
                backbone,
                dataset,
                f"{folder}/{next(numbers)}",
                identity=IDENTITY,
                classes=("none",),
                precision=precision,
                batch_size=args.batch_size,
                shard_images=args.images // 2,
            )

        functions = {"bare": bare, "fp16": lambda: store("fp16"), "int8": lambda: store("int8")}
        summary = summarize(paired_milliseconds(functions, args.device, args.repeats, warm_up=1), baseline="bare")
    common = {"model": name, "images": args.images, "batch_size": args.batch_size, "threads": torch.get_num_threads()}
    return [
        {**common, "implementation": key, "dtype": str(autocast or torch.float32).removeprefix("torch."), **columns}
        for key, columns in summary.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "resnet18"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    for name in args.models:
        rows = [{**row, **environment(args.device)} for row in measure(name, args)]
        for row in rows:
            print(*row.values(), flush=True)
        write_rows(RESULTS / "probe_extraction.csv", rows, key=("device", "model", "implementation"))


if __name__ == "__main__":
    main()
