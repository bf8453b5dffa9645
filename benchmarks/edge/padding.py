"""Files with padded channels against the same without, in ONNX Runtime: paired speed and largest difference.

    visionattn export va_span_ch26_x4 --output FILES/plain.onnx --int8
    visionattn export va_span_ch26_x4 --output FILES/padded.onnx --int8 --pad-channels
    python -m benchmarks.edge.padding --files FILES

Speed is that of one thread, in its CPU time; a number above 1 means that the padded file is faster. Writes
results/edge_padding.csv.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

import numpy as np

from benchmarks.report import RESULTS, environment, write_rows
from visionattn.export import OnnxModel
from visionattn.export.examples import Example
from visionattn.export.quality import Runner, measure_speed

SIZES = ((64, 64), (128, 128), (180, 240))


def measure(precision: str, plain: Path, padded: Path) -> list[dict]:
    """A row for each size."""
    spec = OnnxModel(plain).spec
    files, rows = [Runner(path, OnnxModel(path).spec) for path in (plain, padded)], []
    for height, width in SIZES:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        outputs = [file(Example((image,))) for file in files]
        speed, spread = measure_speed(*files, Example((image,)))
        found = {"speed": f"{speed:.3f}", "speed_half_iqr": f"{spread:.3f}"}
        error = f"{np.abs(outputs[0] - outputs[1]).max():.1e}"
        rows.append({"model": spec.model, "variant": precision, "image": f"{height}x{width}", **found, "error": error})
        print(*rows[-1].values(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True)
    files = parser.parse_args().files
    origin = {"threads": 1, "onnxruntime": importlib.metadata.version("onnxruntime"), **environment("cpu")}
    rows = []
    for precision, suffix in (("fp32", ".onnx"), ("int8", ".int8.onnx")):
        rows += measure(precision, files / f"plain{suffix}", files / f"padded{suffix}")
    write_rows(
        RESULTS / "edge_padding.csv", [row | origin for row in rows], key=("model", "variant", "image", "device")
    )


if __name__ == "__main__":
    main()
