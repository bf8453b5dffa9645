"""SPAN compared with ONNX Runtime and spandrel: one fused network of 48 channels, scale 4, in every engine.

    python -m benchmarks.super_resolution.span_speed [--inputs 128x128 512x512 1280x720] [--repeats 5]

All engines have the same weights and the same image, a photograph, and one thread; nothing is timed before outputs
agree. `ours` is the network as `create_model` gives it, in one pass; `ours channels-last` has its weights in that
layout too; `ours branches` is the form that is trained; `upscale` is `visionattn.predict.upscale`, which cuts large
images into overlapping tiles, and clamps. Engines that are not installed are left out. Writes results/span_speed.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from skimage import data
from torch import Tensor, nn

import visionattn  # noqa: F401  registers the names
from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from visionattn.export import export_onnx
from visionattn.predict import upscale
from visionattn.weights.span import to_official

NAME = "va_span_ch48_x4"
INPUTS = {"128x128": 5, "512x512": 3, "1280x720": 2}
TOLERANCE = 1e-4  # of the spread of the outputs
Engine = Callable[[], Tensor]


def photograph(width: int, height: int) -> Tensor:
    """A piece of a photograph of scikit-image, repeated where it is too small: (1, 3, height, width) in 0..1."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    rows, columns = -(-height // image.shape[2]), -(-width // image.shape[3])
    return image.repeat(1, 1, rows, columns)[..., :height, :width].contiguous()


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME).eval().requires_grad_(False)


def eager(model: nn.Module, x: Tensor) -> Engine:
    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return call


def onnx_runtime(model: nn.Module, x: Tensor, folder: Path) -> Engine:
    import onnxruntime

    path = folder / "span.onnx"
    if not path.exists():
        export_onnx(model, path, check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.asarray(x)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def spandrel_eager(model: nn.Module, x: Tensor) -> Engine:
    from spandrel.architectures.SPAN import SPANArch

    return eager(SPANArch().load(to_official(model)).model.eval(), x)


def engines(x: Tensor, folder: Path) -> dict[str, Engine]:
    """Every engine that is installed, ours first."""
    found = {
        "ours": eager(network(), x),
        "ours channels-last": eager(network().to(memory_format=torch.channels_last), x),
        "ours branches": eager(network().unfuse(), x),
        "upscale": partial(upscale, x, network()),
    }
    for name, make in {
        "onnxruntime": lambda: onnx_runtime(network(), x, folder),
        "spandrel": lambda: spandrel_eager(network(), x),
    }.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"without {name}: {error}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), metavar="WIDTHxHEIGHT")
    parser.add_argument("--repeats", type=int, help="rounds; the default depends on the size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.inputs:
            width, height = map(int, size.split("x"))
            found = engines(photograph(width, height), Path(folder))
            if width * height > 256 * 256:  # minutes a call otherwise
                found.pop("ours branches")
            expected = network().double()(photograph(width, height).double()) if width * height <= 256 * 256 else None
            reference = found["ours"]() if expected is None else expected
            errors = {}
            for name, call in found.items():
                wanted = reference.clamp(0, 1) if name == "upscale" else reference
                errors[name] = ((call() - wanted).abs().max() / (reference.max() - reference.min())).item()
                if not errors[name] < TOLERANCE:
                    raise SystemExit(f"{name} at {size} is off by {errors[name]:.1g} of the outputs' spread.")
            times = paired_milliseconds(found, "cpu", args.repeats or INPUTS.get(size, 3), warm_up=0)
            for name, columns in summarize(times, "onnxruntime" if "onnxruntime" in found else "ours").items():
                row = {
                    "model": NAME,
                    "input": size,
                    "engine": name,
                    **columns,
                    "error": f"{errors[name]:.1e}",
                    "reference": "float64" if expected is not None else "ours",
                    "threads": torch.get_num_threads(),
                    "seed": 0,
                    **environment("cpu"),
                }
                rows.append(row)
                print(*(row[key] for key in ("input", "engine", "median_ms", "iqr_ms", "ratio", "error")), flush=True)
    write_rows(RESULTS / "span_speed.csv", rows, key=("device", "input", "engine"))


if __name__ == "__main__":
    main()
