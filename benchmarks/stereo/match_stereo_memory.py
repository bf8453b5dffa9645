"""How many bytes of tensors a stereo network holds at a time, counted on the meta device: no values, no GPU.

    python -m benchmarks.stereo.match_stereo_memory

Inference with one pair, in float16, operators by their kernels: their results are all that they take. Weights, what
convolutions of a GPU need besides, and the gaps of its allocator come on top. Writes results/match_stereo_memory.csv.
"""

from __future__ import annotations

import timm
import torch
from torch.distributed._tools.mem_tracker import MemTracker

import visionattn  # noqa: F401  registers the names
from benchmarks.report import RESULTS, environment, write_rows

NETWORKS = ("va_match_stereo_nano", "va_match_stereo_tiny")
SIZES = ((384, 1248), (1536, 1536), (2176, 3840))


def main() -> None:
    rows = []
    for name in NETWORKS:
        for height, width in SIZES:
            model = timm.create_model(name, device="meta", dtype=torch.float16).eval()
            views = [torch.empty(1, 3, height, width, device="meta", dtype=torch.float16) for _ in range(2)]
            with torch.no_grad(), MemTracker() as tracker:
                model(*views)
            (most,) = tracker.get_tracker_snapshot("peak").values()
            held = {str(kind).rpartition(".")[2]: count for kind, count in most.items()}
            row = {
                "model": name,
                "input": f"{height}x{width}",
                "dtype": "float16",
                "held_mib": f"{held['ACT'] / 2**20:.0f}",
                "bytes_a_pixel": f"{held['ACT'] / (height * width):.0f}",
                "weights_mib": f"{held['PARAM'] / 2**20:.1f}",
                **environment("cpu"),
                "device": "meta, counted",
            }
            rows.append(row)
            print(*list(row.values())[:6], sep=" | ", flush=True)
    write_rows(RESULTS / "match_stereo_memory.csv", rows)


if __name__ == "__main__":
    main()
