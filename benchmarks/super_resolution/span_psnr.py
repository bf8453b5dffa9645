"""PSNR and SSIM of the SPAN family by the benchmarks' protocol; one CSV row a model, scale and set.

    python -m benchmarks.super_resolution.span_psnr --data FOLDER --weights FOLDER

FOLDER of data holds Set5/HR and Set14/HR, FOLDER of weights the published files of the efficient-SR challenges; names
with weights of their own are measured too. Writes results/span_psnr.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

import visionattn
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.cost import count_macs, count_parameters
from visionattn.evaluate import evaluate_sr
from visionattn.weights import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[str, Any] = {file.stem: visionattn.load(file) for file in sorted(args.weights.glob("*.pth"))}
    for name in visionattn.models.names():
        if name.startswith("va_span_") and (SHIPPED / f"{name}.safetensors").exists():
            models[f"{name}, shipped"] = timm.create_model(name, pretrained=True).eval()
    rows = []
    for scale in sorted({model.scale for model in models.values()}):
        own = {label: model for label, model in models.items() if model.scale == scale}
        for folder in ("Set5", "Set14"):
            found = evaluate_sr(list(own.values()), args.data / folder / "HR", scale=scale)
            if found.failures:
                raise SystemExit(f"Not measured: {found.failures}")
            for label, mean in zip(["bicubic", *own], found.means(), strict=True):
                model = own.get(label)
                rows.append(
                    {
                        "scale": scale,
                        "set": folder,
                        "model": label,
                        "psnr_y": f"{mean.psnr_y:.3f}",
                        "ssim_y": f"{mean.ssim_y:.4f}",
                        "parameters": count_parameters(model) if model else 0,
                        "macs_256x256": count_macs(model, (3, 256, 256)) if model else 0,
                        **environment("cpu"),
                    }
                )
                print(*list(rows[-1].values())[:5], flush=True)
    write_rows(RESULTS / "span_psnr.csv", rows)


if __name__ == "__main__":
    main()
