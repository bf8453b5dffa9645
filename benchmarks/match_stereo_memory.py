"""How many bytes of tensors a stereo network holds at a time, counted on the meta device: no values, no GPU.

    python benchmarks/match_stereo_memory.py

Inference with one pair, in float16, operators by their kernels: their results are all that they take. What convolutions
of a GPU need besides, and the gaps of its allocator, come on top. Writes results/match_stereo_memory.csv.
"""

from __future__ import annotations

import weakref

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import visionattn  # noqa: F401  registers the names
from report import RESULTS, environment, write_rows

NETWORKS = ("va_match_stereo_nano", "va_match_stereo_tiny")
SIZES = ((384, 1248), (1536, 1536), (2176, 3840))


class HeldBytes(TorchDispatchMode):
    """Count the storages that operations make, until they are freed.

    Attributes:
        most: Bytes that were held at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.held.values()))
        return result


def main() -> None:
    rows = []
    for name in NETWORKS:
        for height, width in SIZES:
            model = timm.create_model(name, device="meta", dtype=torch.float16).eval().requires_grad_(False)
            views = [torch.empty(1, 3, height, width, device="meta", dtype=torch.float16) for _ in range(2)]
            with HeldBytes() as counted, torch.no_grad():
                model(*views)
            row = {
                "model": name,
                "input": f"{height}x{width}",
                "dtype": "float16",
                "held_mib": f"{counted.most / 2**20:.0f}",
                "bytes_a_pixel": f"{counted.most / (height * width):.0f}",
                "weights_mib": f"{sum(x.nbytes for x in model.state_dict().values()) / 2**20:.1f}",
                **environment("cpu"),
                "device": "meta, counted",
            }
            rows.append(row)
            print(*list(row.values())[:6], sep=" | ", flush=True)
    write_rows(RESULTS / "match_stereo_memory.csv", rows)


if __name__ == "__main__":
    main()
