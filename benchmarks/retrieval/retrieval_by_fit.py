"""The recipe `attributes_table` by `visionattn fit`, against the same head in `retrieval_heads`.

    python -m benchmarks.retrieval.retrieval_by_fit --data FOLDER --weights FILE [--seeds 0 1 2]

FOLDER and the attributes are those of `retrieval_heads`, whose protocol judges: values with fewer than 40 training
items are unknown, and mAP is over the whole gallery. Each seed is one command in a process of its own, with the
recipe's settings at 128 pixels; its best checkpoint by validation mAP is evaluated by `evaluate_retrieval`. Seconds are
the command's, its evaluation and report included. Rows go to results/retrieval_heads.csv under the regime "frozen, by
fit".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import RESULTS, environment, write_rows
from benchmarks.retrieval.retrieval_heads import ATTRIBUTES, EMBED_DIM, KEY, own
from visionattn.cost import count_parameters
from visionattn.data.retrieval.catalogue_files import read_catalogue
from visionattn.evaluate import evaluate_retrieval
from visionattn.opening import open_model

BACKBONE, HEAD, EPOCHS, RATE, PIXELS, LEAST = "tf_efficientnet_lite0", "linear", 6, 0.003, 128, 40


def train(table: Path, weights: Path, seed: int, runs: Path) -> tuple[Path, float]:
    """Run the command; the best checkpoint, and seconds."""
    model = {"backbone": BACKBONE, "embed_dim": EMBED_DIM, "head": HEAD, "backbone_checkpoint": str(weights.resolve())}
    command = [
        *(sys.executable, "-c", "import sys; from visionattn.cli import main; sys.exit(main())"),
        *("fit", "attributes_table", f"--data.root={table}", f"--data.attributes=[{','.join(ATTRIBUTES)}]"),
        *(f"--data.min_count={LEAST}", f"--data.image_size=[{PIXELS},{PIXELS}]", f"--data.seed={seed}"),
        *(f"--model.model_args={json.dumps(model)}", f"--model.lr={RATE}", f"--trainer.max_epochs={EPOCHS}"),
        *(f"--seed_everything={seed}", f"--trainer.default_root_dir={runs}", "--trainer.accelerator=cpu"),
    ]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    seconds = time.perf_counter() - start
    (best,) = runs.glob("attributes_table/version_*/checkpoints/best.ckpt")
    return best, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of attributes.csv and images.zip")
    parser.add_argument("--weights", type=Path, required=True, help=f"weights of {BACKBONE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieval_heads.csv")
    args = parser.parse_args()
    origin = environment("cpu")  # before rows change the checkout
    table = args.data / "attributes.csv"
    catalogue = read_catalogue("table", table, attributes=ATTRIBUTES, min_count=LEAST)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as work:
            best, seconds = train(table, args.weights, seed, Path(work))
            name = str(best)
            model = open_model(name).model
            found = {}
            for split in ("val", "test"):
                spaces = evaluate_retrieval(name, catalogue, split=split, device="cpu").matrix(name)
                assert isinstance(spaces, torch.Tensor), "the model embeds by attribute"
                found[split] = own(100 * spaces)
        row = {
            **dict(zip(KEY, ("frozen, by fit", BACKBONE, HEAD, seed, EPOCHS, PIXELS))),
            **{f"test_{key}": f"{value:.2f}" for key, value in found["test"].items()},
            "val_judged": f"{found['val']['judged']:.2f}",
            "lr": RATE,
            "parameters": count_parameters(model.head),
            "seconds": f"{seconds:.0f}",
            **origin,
        }
        print(row, flush=True)
        write_rows(args.output, [row], key=KEY)


if __name__ == "__main__":
    main()
