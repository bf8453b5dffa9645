"""Compress runtime and models of the built page for the wheel, where the zip's own compression takes more.

    python -m tools.compress_page visionattn/demo/page

Writes FILE.xz next to each .onnx and each .wasm but WebGPU's, which no wheel contains; the server of `visionattn demo`
decompresses it.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

FILTERS = {
    ".wasm": {"id": lzma.FILTER_LZMA2, "preset": 9},
    ".onnx": {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1},  # numbers of two bytes
}


def main() -> None:
    for file in sorted(Path(sys.argv[1]).rglob("*")):
        if file.suffix in FILTERS and "asyncify" not in file.name:
            compressed = lzma.compress(file.read_bytes(), filters=[FILTERS[file.suffix]])
            file.with_name(f"{file.name}.xz").write_bytes(compressed)
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB -> {len(compressed) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
