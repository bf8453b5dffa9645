"""Compress the runtime of the built page for the wheel, where the zip's own compression takes 1.6 times as much.

    python -m tools.compress_page visionattn/demo/page

Writes FILE.wasm.xz next to each FILE.wasm but WebGPU's, which no wheel contains; the server of `visionattn demo`
decompresses it.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path


def main() -> None:
    for file in sorted(Path(sys.argv[1]).rglob("*.wasm")):
        if "asyncify" not in file.name:
            compressed = lzma.compress(file.read_bytes(), preset=9)
            file.with_name(f"{file.name}.xz").write_bytes(compressed)
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB -> {len(compressed) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
