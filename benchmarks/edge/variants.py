"""Variants of exported files against their float32 file: metric on real data, size, paired speed; one row each.

    visionattn export NAME --output FILES/NAME.onnx        (digits: of visionattn/demo/digits.safetensors)
    python -m benchmarks.edge.variants --files FILES --data FOLDER [--models NAME ...]

FOLDER holds sr/Set5/HR, stereo (scenes of Middlebury), cifar10/test_first1000.webp and mnist. Calibrated as
`visionattn export NAME --int8` does without a folder, and measured elsewhere: SPAN on Set5, stereo on five scenes, ViTs
on CIFAR-10 and MNIST. Speed is that of one thread. Writes results/edge_variants.csv.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import RESULTS, environment, write_rows
from visionattn.data.matching.stereo import find_scenes
from visionattn.export import OnnxModel
from visionattn.export.examples import load_examples
from visionattn.export.fitting import Example, match_example
from visionattn.export.spec import ExportSpec
from visionattn.export.variants import write_variants

FACTORS = {"aloe": 1.0, "teddy": 4.0, "tsukuba": 16.0, "wood2": 2.0}
TILE, ROWS, COLUMNS = 32, 25, 40  # of a sheet of CIFAR-10


def set5(spec: ExportSpec, data: Path) -> list[Example]:
    return load_examples(spec, data / "sr" / "Set5" / "HR")


def middlebury(spec: ExportSpec, data: Path) -> list[Example]:
    pairs = [scene.read() for scene in find_scenes(data / "stereo", "pairs", FACTORS)]
    return [match_example(spec, pair.left, pair.right, pair.truth) for pair in pairs]


def cifar10(spec: ExportSpec, data: Path) -> list[Example]:
    sheet = np.asarray(Image.open(data / "cifar10" / "test_first1000.webp").convert("RGB"))
    tiles = sheet.reshape(ROWS, TILE, COLUMNS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    return [Example((np.ascontiguousarray(tile),)) for tile in tiles]


def mnist(spec: ExportSpec, data: Path) -> list[Example]:
    images = gzip.decompress((data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = np.frombuffer(images, np.uint8).reshape(-1, 28, 28, 1)
    return [Example((image,), label) for image, label in zip(pixels, labels)]


MODELS: dict[str, tuple[str, Callable[[ExportSpec, Path], list[Example]]]] = {
    "va_span_ch26_x2": ("Set5", set5),
    "va_span_ch26_x4": ("Set5", set5),
    "va_minimal_vit_micro_patch4_32": ("CIFAR-10, 1,000 test images", cifar10),
    "digits": ("MNIST, 10,000 test images", mnist),
    "va_match_stereo_nano": ("5 Middlebury scenes", middlebury),
}


def measure(name: str, source: Path, data: Path, folder: Path, origin: dict[str, str]) -> list[dict]:
    """Rows of a model."""
    label, examples = MODELS[name]
    found = write_variants(
        source,
        folder / "variant.onnx",
        int8=True,
        fp16=True,
        test_data=examples(OnnxModel(source).spec, data),
        progress=print,
    )
    rows = []
    for variant in found:
        quality = variant.quality
        assert quality is not None
        rows.append(
            {
                "model": name,
                "variant": variant.spec.precision,
                "data": label,
                "metric": quality.metric,
                "float32": f"{quality.reference:.4f}",
                "value": f"{quality.value:.5f}",
                "loss": f"{quality.loss:.5f}",
                "allowed": quality.allowed,
                "bytes": variant.bytes,
                "speed": f"{variant.speed:.3f}",
                "speed_half_iqr": f"{variant.spread:.3f}",
                "kept_in_float": " ".join(variant.kept),
                "written": not variant.refused,
                "recommended": variant.recommended,
                "threads": 1,
                "onnxruntime": importlib.metadata.version("onnxruntime"),
                **origin,
            }
        )
        print(*list(rows[-1].values())[:12], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    args = parser.parse_args()
    origin = environment("cpu")  # before rows change the checkout
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(name, args.files / f"{name}.onnx", args.data, Path(folder), origin)
        write_rows(RESULTS / "edge_variants.csv", rows, key=("model", "variant", "device"))


if __name__ == "__main__":
    main()
