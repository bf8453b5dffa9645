"""Launchers of the Triton kernels of `visionattn.kernels.halo_attention`, and their tile sizes.

Tensors whose channels are not contiguous are copied. Float32 is multiplied in TF32 if
`torch.backends.cuda.matmul.allow_tf32` is set, otherwise in three TF32 products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from visionattn.kernels._plain.halo_attention import cropped
from visionattn.kernels._triton import ALL_REGISTERS
from visionattn.kernels._triton.halo_attention_kernels import (
    halo_attention_bwd_kv_kernel,
    halo_attention_bwd_q_kernel,
    halo_attention_fwd_kernel,
)

__all__ = [
    "OPTIONS",
    "Shape",
    "Tiles",
    "backward",
    "forward",
    "halo_attention_bwd_kv_kernel",
    "halo_attention_bwd_q_kernel",
    "halo_attention_fwd_kernel",
    "tiles_of_keys",
    "tiles_of_queries",
]

LOG2_E = math.log2(math.e)
OPTIONS = {"num_warps": 4, "num_stages": 1}


class Tiles(NamedTuple):
    """Compile-time parameters of a kernel, and its number of tiles per block."""

    count: int
    constants: dict[str, int]
    options: dict[str, int]


class Shape(NamedTuple):
    """Sizes that determine the tiles."""

    D: int
    DV: int
    block_size: int
    halo_size: int
    stride: int
    dtype: torch.dtype
    from_shared: bool  # whether the chip's tensor cores read matrices from shared memory, which spares registers

    @property
    def wide(self) -> int:
        return max(self.D, self.DV)

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.block_size + 2 * self.halo_size))

    @property
    def constants(self) -> dict[str, int]:
        widths = (max(16, triton.next_power_of_2(width)) for width in (self.D, self.DV))
        return {"PADDED": self.padded, **dict(zip(("PAD_D", "PAD_DV"), widths))}


# The largest tiles whose kernels hold everything in registers on sm_80, sm_90 and sm_100 in half precisions
# (benchmarks/kernels/kernel_resources.py), and the fewest instructions a pair of a query and a key among those. 16 is
# the least that tensor cores take of anything.


def tiles_of_queries(shape: Shape, backward: bool = False, recompute: bool = False) -> Tiles:
    """Tiles of the kernels whose programs have queries and loop over a window, some keys at a time.

    Args:
        shape: Sizes of the call.
        backward: Tiles of the backward kernel instead of the forward one.
        recompute: Tiles of the forward kernel where it recomputes for the backward pass.
    """
    wide, padded = shape.wide, shape.padded
    if shape.dtype == torch.float32:
        queries = keys = 32 if wide <= 32 and not backward else 16
    elif not backward:
        queries, keys = 64, 32 if wide > 64 and not shape.from_shared else 64
    elif wide > 64 and padded > 16 and not shape.from_shared:
        queries, keys = 16, 32
    else:
        queries, keys = 64, 64 if wide <= 16 else 32 if wide <= 64 else 16
    count, queries, pitch = _numbered(shape.block_size // shape.stride, queries)
    constants = {"BLOCK_M": queries, "PITCH": pitch, "ROWS": max(1, keys // padded)}
    many = (backward or recompute or shape.dtype == torch.float32) and (wide > 32 or padded > 16)
    return Tiles(count, shape.constants | constants, OPTIONS | (ALL_REGISTERS if many else {}))


def tiles_of_keys(shape: Shape) -> Tiles:
    """Tiles of the kernel whose programs have keys and go over the queries that see them."""
    wide, padded = shape.wide, shape.padded
    side = shape.block_size // shape.stride
    warps = OPTIONS["num_warps"]
    if shape.dtype == torch.float32:
        queries = keys = 16
    elif wide > 64:
        queries, keys, warps = 32, 64, 8
    elif wide > 32 and (padded > 16 or not shape.from_shared):
        queries, keys, warps = 32, 32, 2 if padded == 16 else 4
    else:
        even = _numbered(side, 64)[2] == triton.next_power_of_2(side)
        queries, keys = 64 if padded == 16 and (wide <= 32 or even) else 32, 64
    _, queries, pitch = _numbered(side, queries)
    count, keys, key_pitch = _numbered(shape.block_size, keys)
    constants = {"BLOCK_M": queries, "PITCH": pitch, "BLOCK_N": keys, "KEY_PITCH": key_pitch}
    return Tiles(count, shape.constants | constants, OPTIONS | ALL_REGISTERS | {"num_warps": warps})


def _numbered(side: int, most: int) -> tuple[int, int, int]:
    """How a block's pixels are cut into tiles: number, size, and index pitch from one row of the block to the next.

    The pitch is a power of two if that takes no more tiles: other divisions cost registers and a tenth of the time.
    """
    size = min(most, max(16, triton.next_power_of_2(side * side)))
    count, pitch = triton.cdiv(side * side, size), triton.next_power_of_2(side)
    return count, size, pitch if triton.cdiv(side * pitch, size) == count else side


def precision(dtype: torch.dtype) -> str:
    """Input precision of products of a dtype; half precision is determined by the dtype."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _from_shared(device: torch.device) -> bool:
    """`wgmma` and `tcgen05` take matrices from shared memory; `mma.sync` of other generations takes registers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10, 11)


class _Call:
    """The arguments of a call, and the kernels over them."""

    def __init__(self, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> None:
        self.maps = [_dense(x) for x in (q, k, v)]
        self.tables = height_rel.contiguous(), width_rel.contiguous()
        (self.B, self.heads, D, H, W), DV = k.shape, v.shape[2]
        self.shape = Shape(D, DV, block_size, halo_size, stride, q.dtype, _from_shared(q.device))
        self.grid = -(-H // block_size), -(-W // block_size)
        self.key_grid = -(-(H + halo_size) // block_size), -(-(W + halo_size) // block_size)
        self.inputs = dict(zip(("q_ptr", "k_ptr", "v_ptr", "height_ptr", "width_ptr"), (*self.maps, *self.tables)))
        QH, QW = q.shape[3:]
        ny, nx = self.grid
        self.sizes = {"heads": self.heads, "H": H, "W": W, "QH": QH, "QW": QW, "ny": ny, "nx": nx, "D": D, "DV": DV}
        for name, x in zip("qkv", self.maps):
            self.sizes |= {f"{name}_s{axis}": x.stride(dim) for axis, dim in (("b", 0), ("y", 3), ("x", 4), ("h", 1))}
        self.sizes["scale"] = D**-0.5 * LOG2_E
        self.masked = border == "mask"
        self.constants = {
            "BLOCK": block_size,
            "HALO": halo_size,
            "STRIDE": stride,
            "STEP": stride if index == "offset" else 1,
            "HALF": q.dtype != torch.float32,
            "PRECISION": precision(q.dtype),
            "enable_fp_fusion": True,
        }

    def windows(self, tiles: Tiles) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and constants of a kernel over queries and their windows."""
        grid = self.B * self.grid[0] * self.grid[1] * self.heads, tiles.count
        return grid, {"MASK": self.masked, **tiles.constants, **tiles.options, **self.constants}

    def forward(self) -> Tensor:
        """The output, (B, H', W', heads, Dv)."""
        q, _, v = self.maps
        out = q.new_empty(self.B, *q.shape[3:], self.heads, v.shape[2])
        self._forward(do=out, out=out, lse=out, delta=out, recompute=False)
        return out

    def _forward(self, do: Tensor, out: Tensor, lse: Tensor, delta: Tensor, recompute: bool) -> None:
        """Write `out`, or with `recompute` `lse` and `delta` from `do`; the other tensors are not accessed."""
        grid, constants = self.windows(tiles_of_queries(self.shape, recompute=recompute))
        with torch.cuda.device_of(out):
            halo_attention_fwd_kernel[grid](
                **self.inputs,
                do_ptr=do,
                out_ptr=out,
                lse_ptr=lse,
                delta_ptr=delta,
                **self.sizes,
                RECOMPUTE=recompute,
                **constants,
            )

    def backward(self, do: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v, channels-last, and of the tables."""
        do = do.permute(0, 3, 4, 1, 2).contiguous()
        lse, delta = (do.new_empty(do.shape[:4], dtype=torch.float32) for _ in range(2))
        self._forward(do=do, out=do, lse=lse, delta=delta, recompute=True)
        dq, dk, dv = (x.new_empty(self.B, *x.shape[3:], self.heads, x.shape[2]) for x in self.maps)
        grid, constants = self.windows(tiles_of_queries(self.shape, backward=True))
        dheight, dwidth = (table.new_empty(*grid, *table.shape, dtype=torch.float32) for table in self.tables)
        of_keys = tiles_of_keys(self.shape)
        key_ny, key_nx = self.key_grid
        inputs = {"do_ptr": do, **self.inputs, "lse_ptr": lse, "delta_ptr": delta}
        with torch.cuda.device_of(do):
            halo_attention_bwd_q_kernel[grid](
                **inputs, dq_ptr=dq, dheight_ptr=dheight, dwidth_ptr=dwidth, **self.sizes, **constants
            )
            halo_attention_bwd_kv_kernel[(self.B * key_ny * key_nx * self.heads, of_keys.count)](
                **inputs,
                dk_ptr=dk,
                dv_ptr=dv,
                **self.sizes,
                key_ny=key_ny,
                key_nx=key_nx,
                **of_keys.constants,
                **of_keys.options,
                **self.constants,
            )
        dtables = (part.sum((0, 1)).to(table.dtype) for part, table in zip((dheight, dwidth), self.tables))
        return *(x.permute(0, 3, 4, 1, 2) for x in (dq, dk, dv)), *dtables


def _dense(x: Tensor) -> Tensor:
    """Give a map (B, heads, channels, height, width) whose channels lie side by side."""
    if x.stride(2) == 1 or x.shape[2] == 1:
        return x
    return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    border: str,
    index: str,
) -> Tensor:
    """Launch the forward kernel. Any strides; the result is laid out like q."""
    out = _Call(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index).forward()
    return cropped(out.permute(0, 3, 4, 1, 2), q)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    border: str,
    index: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel again, then the backward kernels. Any strides; the results are laid out as given."""
    call = _Call(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    *dmaps, dheight, dwidth = call.backward(do)
    dq, dk, dv = (cropped(gradient, x) for gradient, x in zip(dmaps, (q, k, v)))
    return dq, dk, dv, dheight, dwidth
