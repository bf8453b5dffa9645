"""Most memory, and the time, of `visionattn upscale` for one large photograph.

    python -m benchmarks.super_resolution.upscale_memory [--sizes 4000x3000] [--models va_span_ch26_x4]

The command runs in a process of its own, with its defaults and one thread; the photograph is scikit-image's astronaut,
repeated. What is measured is all that a user's machine gives to it: Python, PyTorch, both images, the tiles, and the
writing of the PNG. Writes results/upscale_memory.csv.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.report import RESULTS, environment, write_rows

Image.MAX_IMAGE_PIXELS = None  # the result is larger than what PIL takes for an attack

COMMAND = "import sys; from visionattn.cli import main; sys.exit(main())"


def photograph(width: int, height: int) -> Image.Image:
    """The astronaut, repeated."""
    tile = data.astronaut()
    repeats = (-(-height // tile.shape[0]), -(-width // tile.shape[1]), 1)
    return Image.fromarray(np.tile(tile, repeats)[:height, :width])


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run `visionattn` with arguments: peak memory in MiB, seconds."""
    start = time.perf_counter()
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", COMMAND, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"visionattn {' '.join(arguments)} failed.")
    assert isinstance(usage, resource.struct_rusage)
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4000x3000"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--models", nargs="+", default=["va_span_ch26_x4"])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            width, height = map(int, size.split("x"))
            source, result = Path(folder) / f"{size}.png", Path(folder) / f"{size}_large.png"
            photograph(width, height).save(source)
            for model in args.models:
                peak, seconds = measure(["upscale", str(source), str(result), "--model", model, "--overwrite"])
                header = Image.open(result)
                rows.append(
                    {
                        "model": model,
                        "input": size,
                        "megapixels": f"{width * height / 1e6:.1f}",
                        "output": f"{header.width}x{header.height}",
                        "peak_mib": f"{peak:.0f}",
                        "seconds": f"{seconds:.0f}",
                        "threads": 1,
                        **environment("cpu"),
                    }
                )
                print(rows[-1], flush=True)
    write_rows(RESULTS / "upscale_memory.csv", rows, key=("device", "model", "input"))


if __name__ == "__main__":
    main()
