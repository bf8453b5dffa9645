r"""Halo attention: blocks of queries attend to their block and a halo around it, with relative positions.

A map is cut into blocks of b x b pixels. All queries of a block share one window of keys: the block and a halo of h
pixels on each side, w = b + 2h pixels wide. Query i and key j of a window, at in-block and in-window coordinates
(i_y, i_x) and (j_y, j_x), have the logit

    l_ij = q_i . k_j / sqrt(D) + q_i . U[row(i_y, j_y)] + q_i . V[row(i_x, j_x)]
    o_i  = sum over j of softmax_j(l_ij) v_j

    q           (B, heads, D, H', W')    H' = ceil(H / s): with stride s, every s-th pixel of each axis asks
    k           (B, heads, D, H, W)
    v           (B, heads, Dv, H, W)
    height_rel  (2w - 1, D)              U, shared by all heads
    width_rel   (2w - 1, D)              V
    out         (B, heads, Dv, H', W')   memory channels-last where that of q is, else contiguous

`index` says which row of a table belongs to a query and a key:

    "offset"   row = (w - 1) + j - s i    the true distance in pixels, up to a constant
    "timm"     row = (w - 1) + j - i      i counts subsampled queries, as in timm; the same at stride 1

`border` says what lies outside the map, where a map that b does not divide ends inside its last blocks:

    "mask"     nothing: such keys take no part in the softmax
    "zero"     keys and values of zeros, which take a share of the softmax (timm's and the paper's padding)

Dtypes: float64, float32, bfloat16, float16, all arguments of one; half precisions are computed in float32.
Tolerance, forward and gradients, as a share of the float64 result's largest magnitude, or of 1 where that is less:
    float64 1e-13, float32 1e-5, bfloat16 2e-2, float16 2e-3.
Form: chunks of blocks whose logits stay in a CPU's cache. Only the arguments are kept for the backward pass, which
computes the softmax again.
Kernels: Triton on CUDA, for heads up to 128 wide, 16 for the gradients of float32, and windows up to 32; what is beyond
that, float64 and other devices take the plain form.
Limits: b must be a multiple of s.
Second derivatives, forward mode and the transforms of `torch.func` take the definition, and its memory.
Sources: HaloNet, arXiv 2103.12731; the relative logits are those of arXiv 1904.09925.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import check_alike, kernels_enabled, register, register_flop_formula

__all__ = ["BORDERS", "INDICES", "halo_attention_definition"]

BORDERS = ("mask", "zero")
INDICES = ("offset", "timm")


def halo_attention_definition(
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
    """The definition, in plain PyTorch. Windows are gathered as rows of a table of pixels: the fastest form in ONNX."""
    (B, heads, D, H, W), Dv = k.shape, v.shape[2]
    b, h, w, bq = block_size, halo_size, block_size + 2 * halo_size, block_size // stride
    ny, nx = (H + b - 1) // b, (W + b - 1) // b
    in_window = torch.arange(w, device=q.device)
    pixel_y = torch.arange(ny, device=q.device)[:, None] * b + in_window  # (ny, w), in the padded map
    pixel_x = torch.arange(nx, device=q.device)[:, None] * b + in_window

    def windows(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x.flatten(1, 2), (h, h + nx * b - W, h, h + ny * b - H))
        pixels = padded.permute(0, 2, 3, 1).flatten(1, 2)  # (B, padded pixels, heads D)
        chosen = pixel_y[:, None, :, None] * (nx * b + 2 * h) + pixel_x[None, :, None, :]
        rows = pixels.index_select(1, chosen.flatten())
        return rows.view(B, ny * nx, w * w, heads, x.shape[2]).transpose(2, 3)  # (B, blocks, heads, w w, D)

    q = torch.nn.functional.pad(q, (0, nx * bq - q.shape[4], 0, ny * bq - q.shape[3]))
    q = q.view(B, heads, D, ny, bq, nx, bq).permute(0, 3, 5, 1, 4, 6, 2)  # (B, ny, nx, heads, bq, bq, D)
    row = _rows(bq, w, stride, index, q.device)
    height = torch.einsum("bnmhyxd,yjd->bnmhyxj", q, height_rel[row])
    width = torch.einsum("bnmhyxd,xjd->bnmhyxj", q, width_rel[row])
    if border == "mask":
        height = height + _border(pixel_y - h, H, q.dtype)[:, None, None, None, None]
        width = width + _border(pixel_x - h, W, q.dtype)[:, None, None, None]
    relative = (height[..., None] + width[..., None, :]).reshape(B, ny * nx, heads, bq * bq, w * w)
    logits = q.reshape(B, ny * nx, heads, bq * bq, D) * D**-0.5 @ windows(k).transpose(-1, -2) + relative
    out = logits.softmax(-1) @ windows(v)  # (B, blocks, heads, bq bq, Dv)
    out = out.view(B, ny, nx, heads, bq, bq, Dv).permute(0, 3, 6, 1, 4, 2, 5).reshape(B, heads, Dv, ny * bq, nx * bq)
    return out[..., : (H + stride - 1) // stride, : (W + stride - 1) // stride]


def _rows(queries: int, window: int, stride: int, index: str, device: torch.device) -> Tensor:
    """Rows of a relative table, (queries, window)."""
    i = torch.arange(queries, device=device)[:, None] * (stride if index == "offset" else 1)
    return window - 1 + torch.arange(window, device=device) - i


def _border(pixel: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """What to add to the logits of a key at each coordinate: 0 inside the map, -inf outside."""
    outside = (pixel < 0) | (pixel >= size)
    return torch.zeros(pixel.shape, dtype=dtype, device=pixel.device).masked_fill(outside, float("-inf"))


# Plain form. The logits of all blocks together are w^2 / D times as large as q, far beyond any cache: chunks of blocks
# go from the projections to the output one after the other.

# Logits of a chunk. On CPUs 2 MiB of float32, about the size of a core's second-level cache, was the fastest of 0.5 to
# 8 MiB; elsewhere, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**19, 2**26

_Chunk = tuple[slice, slice, slice]  # images, rows of blocks, columns of blocks


class _Blocked:
    """One call's arguments, cut into blocks of queries and windows of keys, and the passes over them."""

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
        self.rows = _rows(self.queries, self.window, stride, index, q.device)
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
        return _border(first + torch.arange(self.window, device=first.device), size, self.dtype)

    def chunks(self) -> Iterator[_Chunk]:
        """Give all blocks in groups whose logits are of about the wanted number."""
        B, ny, nx, heads = self.q.shape[:4]
        wanted = _CHUNK_ON_CPU if self.q.device.type == "cpu" else _CHUNK_ELSEWHERE
        room = max(1, wanted // (heads * (self.queries * self.window) ** 2))
        columns, rows, images = min(nx, room), max(1, room // nx), max(1, room // (nx * ny))
        for image, row, column in product(range(0, B, images), range(0, ny, rows), range(0, nx, columns)):
            yield slice(image, image + images), slice(row, row + rows), slice(column, column + columns)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that every chunk uses again: asking for it anew costs more than what is done with it."""
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
        out = _empty(self.like_q, self.like_v.shape[2], self.query_size)
        out_blocks = self.blocks(out)
        for chunk in self.chunks():
            *_, v, p = self.attend(chunk)
            target = out_blocks[chunk]
            target.copy_(torch.bmm(p, v.transpose(1, 2)).view(target.shape))
        return _cropped(out, self.like_q)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and the two tables."""
        grad_blocks = self.blocks(_padded(grad, 0, *self.query_size, grad.dtype))
        grad_q = _empty(self.like_q, self.like_q.shape[2], self.query_size)
        grad_q_blocks = self.blocks(grad_q)
        grad_k, grad_v = (_zeros(x, self.halo, *self.key_size, self.dtype) for x in (self.like_k, self.like_v))
        grad_height, grad_width = torch.zeros_like(self.height), torch.zeros_like(self.width)
        for chunk in self.chunks():
            q, k, v, p = self.attend(chunk)
            flat_q = q.flatten(1, 2)
            g = self.gather("grad", grad_blocks[chunk]).flatten(1, 2)
            slope = torch.bmm(g, v, out=self.scratch("slope", *p.shape))  # of the weights
            # k and v have been read for the last time when their memory takes their gradients.
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
            _cropped(grad_q, self.like_q),
            _cropped(grad_k[..., self.halo :, self.halo :], self.like_k),
            _cropped(grad_v[..., self.halo :, self.halo :], self.like_v),
            self.sum_rows(grad_height),
            self.sum_rows(grad_width),
        )

    def add_windows(self, target: Tensor, chunk: _Chunk, update: Tensor) -> None:
        """Add windows where they lie in a key map. Those `apart` blocks from each other do not overlap."""
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
    """Copy a map into zeros, unless it is already what is wanted."""
    H, W = x.shape[3:]
    if margin == 0 and (height, width) == (H, W) and x.dtype == dtype:
        return x
    padded = _zeros(x, margin, height, width, dtype)
    padded[..., margin : margin + H, margin : margin + W] = x
    return padded


def _zeros(like: Tensor, margin: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(*like.shape[:3], height + 2 * margin, width + 2 * margin, dtype=dtype)


def _empty(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """A map with the memory order of another: channels-last or contiguous."""
    B, heads = like.shape[:2]
    if like.stride(2) == 1 != like.stride(4):
        return like.new_empty(B, *size, heads, channels).permute(0, 3, 4, 1, 2)
    return like.new_empty(B, heads, channels, *size)


def _cropped(x: Tensor, like: Tensor) -> Tensor:
    """The top left of a map, in the size, memory order and dtype of another, whose number of channels may differ."""
    H, W = like.shape[3:]
    out = _empty(like, x.shape[2], (H, W))
    if x.shape == out.shape and x.stride() == out.stride() and x.dtype == out.dtype:
        return x
    return out.copy_(x[..., :H, :W])


def _check(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index, grad=None) -> None:
    tensors = {"q": q, "k": k, "v": v, "height_rel": height_rel, "width_rel": width_rel}
    check_alike("halo_attention", **tensors, **({} if grad is None else {"grad": grad}))
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride:
        raise InputError(
            f"halo_attention takes a block of 1 pixel or more that the stride divides and a halo of 0 pixels or more, "
            f"but got block_size {block_size}, stride {stride} and halo_size {halo_size}."
        )
    if border not in BORDERS or index not in INDICES:
        raise InputError(
            f"halo_attention's border is one of {', '.join(BORDERS)} and its index one of {', '.join(INDICES)}, "
            f"but got {border!r} and {index!r}."
        )
    given = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if q.ndim != 5 or k.ndim != 5 or v.ndim != 5:
        raise InputError(f"halo_attention takes q, k and v as (B, heads, channels, height, width), but got {given}.")
    if 0 in (*k.shape[1:], v.shape[2]):
        raise InputError(f"halo_attention takes one head, channel and pixel or more, but got {given}.")
    size = tuple((pixels + stride - 1) // stride for pixels in k.shape[3:])
    if q.shape[:3] != k.shape[:3] or v.shape[:2] != k.shape[:2] or v.shape[3:] != k.shape[3:] or q.shape[3:] != size:
        raise InputError(
            f"halo_attention takes q (B, heads, D, H', W'), k (B, heads, D, H, W) and v (B, heads, Dv, H, W) with "
            f"H' = ceil(H / {stride}), but got {given}."
        )
    table = (2 * (block_size + 2 * halo_size) - 1, q.shape[2])
    if height_rel.shape != table or width_rel.shape != table:
        raise InputError(
            f"halo_attention takes relative tables of shape {tuple(table)}, 2 * ({block_size} + 2 * {halo_size}) - 1 "
            f"rows for block_size {block_size} and halo_size {halo_size}, but got {given}."
        )


def _use_triton(k: Tensor, v: Tensor, window: int, backward: bool = False) -> bool:
    width = max(k.shape[2], v.shape[2])
    return (
        k.dtype != torch.float64
        and k.numel() > 0
        and width <= (16 if backward and k.dtype == torch.float32 else 128)
        and window <= 32
        and kernels_enabled(k.device)
    )


@torch.library.custom_op("visionattn::halo_attention", mutates_args=())
def halo_attention(
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
    args = (q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    _check(*args)
    return _Blocked(*args).forward()


@halo_attention.register_kernel("cuda")
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> Tensor:
    args = (q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    _check(*args)
    if not _use_triton(k, v, block_size + 2 * halo_size):
        return _Blocked(*args).forward()
    from visionattn.kernels._triton import halo_attention as triton_kernels

    return triton_kernels.forward(*args)


@halo_attention.register_fake
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> Tensor:
    _check(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    return _empty(q, v.shape[2], q.shape[3:])


@torch.library.custom_op("visionattn::halo_attention_backward", mutates_args=())
def halo_attention_backward(
    grad: Tensor,
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
    args = (q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    _check(*args, grad=grad)
    return _Blocked(*args).backward(grad)


@halo_attention_backward.register_kernel("cuda")
def _(grad, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index):
    args = (q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    _check(*args, grad=grad)
    if not _use_triton(k, v, block_size + 2 * halo_size, backward=True):
        return _Blocked(*args).backward(grad)
    from visionattn.kernels._triton import halo_attention as triton_kernels

    return triton_kernels.backward(grad, *args)


@halo_attention_backward.register_fake
def _(grad, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index):
    maps = (_empty(x, x.shape[2], x.shape[3:]) for x in (q, k, v))
    return *maps, *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (height_rel, width_rel))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _differentiate(ctx, grad: Tensor):
    grads = torch.ops.visionattn.halo_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * len(ctx.settings)


register(
    "halo_attention",
    definition=halo_attention_definition,
    check=_check,
    save=_save,
    differentiate=_differentiate,
)


def _products(q, k, v, block_size: int, halo_size: int, stride: int) -> tuple[int, int]:
    """Multiplications of the forward pass with q, k and the tables, and with v."""
    (B, heads, D, H, W), Dv = k, v[2]
    queries, window = block_size // stride, block_size + 2 * halo_size
    blocks = B * heads * -(-H // block_size) * -(-W // block_size)
    return blocks * queries**2 * D * (window**2 + 2 * window), blocks * queries**2 * Dv * window**2


@register_flop_formula(torch.ops.visionattn.halo_attention)
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, *settings, out_shape=None) -> int:
    """Products with keys, values and tables, queries of ragged blocks included."""
    return 2 * sum(_products(q, k, v, block_size, halo_size, stride))


@register_flop_formula(torch.ops.visionattn.halo_attention_backward)
def _(grad, q, k, v, height_rel, width_rel, block_size, halo_size, stride, *settings, out_shape=None) -> int:
    """Two products for each of the forward pass, as autograd over the definition; those computed again do not count."""
    return 4 * sum(_products(q, k, v, block_size, halo_size, stride))
