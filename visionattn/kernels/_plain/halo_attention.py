"""The plain form of `visionattn.kernels.halo_attention` for CPUs.

The logits of all blocks together are w^2 / D times as large as q, far beyond any cache: blocks are processed in chunks,
each from the projections to the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

__all__ = ["backward", "border_bias", "cropped", "empty_map", "forward", "table_rows"]


def table_rows(queries: int, window: int, stride: int, index: str, device: torch.device) -> Tensor:
    """Rows of a relative table, (queries, window)."""
    i = torch.arange(queries, device=device)[:, None] * (stride if index == "offset" else 1)
    return window - 1 + torch.arange(window, device=device) - i


def border_bias(pixel: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Bias of the logits for a key at each coordinate: 0 inside the map, -inf outside."""
    outside = torch.logical_or(pixel < 0, pixel >= size)
    return torch.zeros(pixel.shape, dtype=dtype, device=pixel.device).masked_fill(outside, float("-inf"))


# Logits of a chunk. On CPUs 2 MiB of float32, about the size of a core's second-level cache, was the fastest of 0.5 to
# 8 MiB; on other devices, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**19, 2**26

_Chunk = tuple[slice, slice, slice]  # images, rows of blocks, columns of blocks


class Blocked:
    """The arguments of a call, cut into blocks of queries and windows of keys, and the passes over them."""

    def __init__(self, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> None:
        H, W = k.shape[3:]
        self.like_q, self.like_k, self.like_v, self.tables = q, k, v, height_rel
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32  # of the computation
        self.block, self.halo = block_size, halo_size
        self.queries, self.window = block_size // stride, block_size + 2 * halo_size  # of one axis
        self.grid = -(-H // block_size), -(-W // block_size)
        self.scale = q.shape[2] ** -0.5
        self.memory: dict[str, Tensor] = {}

        self.q = self.blocks(_padded(q, 0, *self.query_size, q.dtype))
        self.k = self.windows(_padded(k, self.halo, *self.key_size, self.dtype))
        self.v = self.windows(_padded(v, self.halo, *self.key_size, self.dtype))
        self.rows = table_rows(self.queries, self.window, stride, index, q.device)
        self.height = height_rel[self.rows].to(self.dtype)  # (bq, w, D)
        self.width = width_rel[self.rows].to(self.dtype)
        self.border_y = self.border(self.grid[0], H) if border == "mask" else None  # (ny, w)
        self.border_x = self.border(self.grid[1], W) if border == "mask" else None

    @property
    def query_size(self) -> tuple[int, int]:
        """Height and width of the map of queries in whole blocks."""
        return self.grid[0] * self.queries, self.grid[1] * self.queries

    def blocks(self, x: Tensor) -> Tensor:
        """View a map of whole blocks as (B, ny, nx, heads, bq, bq, channels)."""
        return x.unflatten(4, (self.grid[1], -1)).unflatten(3, (self.grid[0], -1)).permute(0, 3, 5, 1, 4, 6, 2)

    @property
    def key_size(self) -> tuple[int, int]:
        """Height and width of the map of keys in whole blocks, without the halo around it."""
        return self.grid[0] * self.block, self.grid[1] * self.block

    def windows(self, x: Tensor) -> Tensor:
        """View a map of keys as overlapping windows (B, ny, nx, heads, channels, w, w)."""
        return x.unfold(3, self.window, self.block).unfold(4, self.window, self.block).permute(0, 3, 4, 1, 2, 5, 6)

    def border(self, blocks: int, size: int) -> Tensor:
        first = torch.arange(blocks, device=self.like_q.device)[:, None] * self.block - self.halo
        return border_bias(first + torch.arange(self.window, device=first.device), size, self.dtype)

    def chunks(self) -> Iterator[_Chunk]:
        """Groups of all blocks with about the intended number of logits."""
        B, ny, nx, heads = self.q.shape[:4]
        wanted = _CHUNK_ON_CPU if self.q.device.type == "cpu" else _CHUNK_ELSEWHERE
        room = max(1, wanted // (heads * (self.queries * self.window) ** 2))
        columns, rows, images = min(nx, room), max(1, room // nx), max(1, room // (nx * ny))
        for image, row, column in product(range(0, B, images), range(0, ny, rows), range(0, nx, columns)):
            yield slice(image, image + images), slice(row, row + rows), slice(column, column + columns)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory reused by all chunks: allocating it again costs more than the computation in it."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = self.like_q.new_empty(size, dtype=self.dtype)
        return self.memory[name][:size].view(shape)

    def gather(self, name: str, x: Tensor) -> Tensor:
        """Copy blocks or windows of a chunk, (images, ny, nx, heads, ...) -> (G, ...)."""
        return self.scratch(name, *x.shape).copy_(x).flatten(0, 3)

    def attend(self, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A chunk's G = images * rows * columns * heads blocks.

        Returns:
            q (G, bq, bq, D), k (G, D, w w), v (G, Dv, w w) and the attention weights (G, bq bq, w w).
        """
        grid = self.q[chunk].shape[:4]
        q = self.gather("q", self.q[chunk])
        k = self.gather("k", self.k[chunk]).flatten(2)
        v = self.gather("v", self.v[chunk]).flatten(2)
        height = torch.einsum("gyxd,yjd->gyxj", q, self.height)
        width = torch.einsum("gyxd,xjd->gyxj", q, self.width)
        if self.border_y is not None and self.border_x is not None:
            height.unflatten(0, grid).add_(self.border_y[chunk[1], None, None, None, None])
            width.unflatten(0, grid).add_(self.border_x[chunk[2], None, None, None])
        logits = self.scratch("p", *q.shape[:3], self.window, self.window)
        torch.add(height[..., None], width[..., None, :], out=logits)
        logits = logits.flatten(3).flatten(1, 2)
        logits.baddbmm_(q.flatten(1, 2), k, alpha=self.scale)
        return q, k, v, torch.softmax(logits, -1, out=logits)

    def forward(self) -> Tensor:
        """The output, (B, heads, Dv, H', W')."""
        out = empty_map(self.like_q, self.like_v.shape[2], self.query_size)
        out_blocks = self.blocks(out)
        for chunk in self.chunks():
            *_, v, p = self.attend(chunk)
            target = out_blocks[chunk]
            target.copy_(torch.bmm(p, v.transpose(1, 2)).view(target.shape))
        return cropped(out, self.like_q)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and the two tables."""
        grad_blocks = self.blocks(_padded(grad, 0, *self.query_size, grad.dtype))
        grad_q = empty_map(self.like_q, self.like_q.shape[2], self.query_size)
        grad_q_blocks = self.blocks(grad_q)
        grad_k, grad_v = (_zeros(x, self.halo, *self.key_size, self.dtype) for x in (self.like_k, self.like_v))
        grad_height, grad_width = torch.zeros_like(self.height), torch.zeros_like(self.width)
        for chunk in self.chunks():
            q, k, v, p = self.attend(chunk)
            flat_q = q.flatten(1, 2)
            g = self.gather("grad", grad_blocks[chunk]).flatten(1, 2)
            slope = torch.bmm(g, v, out=self.scratch("slope", *p.shape))  # of the weights
            # k and v are not read again: their memory is reused for their gradients.
            self.add_windows(grad_v, chunk, torch.bmm(g.transpose(1, 2), p, out=v))
            torch.ops.aten._softmax_backward_data.out(slope, p, -1, self.dtype, grad_input=slope)  # of the logits
            slope_q = torch.bmm(slope, k.transpose(1, 2)).mul_(self.scale).view(q.shape)
            self.add_windows(grad_k, chunk, torch.bmm(flat_q.transpose(1, 2), slope, out=k).mul_(self.scale))
            slope = slope.view(*q.shape[:3], self.window, self.window)
            slope_y, slope_x = slope.sum(-1), slope.sum(-2)
            slope_q += torch.einsum("gyxj,yjd->gyxd", slope_y, self.height)
            slope_q += torch.einsum("gyxj,xjd->gyxd", slope_x, self.width)
            grad_height += torch.einsum("gyxj,gyxd->yjd", slope_y, q)
            grad_width += torch.einsum("gyxj,gyxd->xjd", slope_x, q)
            target = grad_q_blocks[chunk]
            target.copy_(slope_q.view(target.shape))
        return (
            cropped(grad_q, self.like_q),
            cropped(grad_k[..., self.halo :, self.halo :], self.like_k),
            cropped(grad_v[..., self.halo :, self.halo :], self.like_v),
            self.sum_rows(grad_height),
            self.sum_rows(grad_width),
        )

    def add_windows(self, target: Tensor, chunk: _Chunk, update: Tensor) -> None:
        """Add windows at their positions in a key map. Those `apart` blocks from each other do not overlap."""
        windows = self.windows(target)[chunk]
        update = update.view(windows.shape)
        apart = -(-self.window // self.block)
        for y, x in product(range(apart), repeat=2):
            windows[:, y::apart, x::apart].add_(update[:, y::apart, x::apart])

    def sum_rows(self, x: Tensor) -> Tensor:
        """Sum the entries (bq, w, D) that came from one row of a table."""
        total = x.new_zeros(self.tables.shape).index_add_(0, self.rows.flatten(), x.flatten(0, 1))
        return total.to(self.tables.dtype)


def _padded(x: Tensor, margin: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Copy a map into zeros, unless it already has the right size and dtype."""
    H, W = x.shape[3:]
    if margin == 0 and (height, width) == (H, W) and x.dtype == dtype:
        return x
    padded = _zeros(x, margin, height, width, dtype)
    padded[..., margin : margin + H, margin : margin + W] = x
    return padded


def _zeros(like: Tensor, margin: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(*like.shape[:3], height + 2 * margin, width + 2 * margin, dtype=dtype)


def empty_map(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """A map with the memory format of another: channels-last or contiguous."""
    B, heads = like.shape[:2]
    if like.stride(2) == 1 != like.stride(4):
        return like.new_empty(B, *size, heads, channels).permute(0, 3, 4, 1, 2)
    return like.new_empty(B, heads, channels, *size)


def cropped(x: Tensor, like: Tensor) -> Tensor:
    """The top left of a map, in the size, memory format and dtype of another, whose number of channels may differ."""
    H, W = like.shape[3:]
    out = empty_map(like, x.shape[2], (H, W))
    if x.shape == out.shape and x.stride() == out.stride() and x.dtype == out.dtype:
        return x
    return out.copy_(x[..., :H, :W])


def forward(*args) -> Tensor:
    """The output, (B, heads, Dv, H', W')."""
    return Blocked(*args).forward()


def backward(grad: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the two tables."""
    return Blocked(*args).backward(grad)
