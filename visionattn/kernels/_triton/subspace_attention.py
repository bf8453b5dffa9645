"""Triton kernels of `visionattn.kernels.subspace_attention`.

Two passes over x forward: one sums the pooled channels of a subspace to its logits, one multiplies by the gate, whose
softmax each program sums for itself, for the logits are a small part of x. Backward, the pool is passed through twice:
the first kernel finds which of its nine values each window takes, a byte a window (9 where ReLU cuts it off), and the
second lets each pixel collect from the nine windows around it. Sums over a map are its program's, sums over images
PyTorch's; nothing is added atomically. What is as small as the logits is left to PyTorch, as in the plain form.

Maps that are not contiguous are copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.subspace_attention import _Attention, _computed, _empty_logits

__all__ = [
    "OPTIONS",
    "TILE",
    "backward",
    "forward",
    "subspace_attention_bwd_gate_kernel",
    "subspace_attention_bwd_pool_kernel",
    "subspace_attention_bwd_x_kernel",
    "subspace_attention_fwd_gate_kernel",
    "subspace_attention_fwd_logits_kernel",
]

TILE = {"BLOCK_C": 4, "BLOCK_P": 256}  # channels and positions: 8 numbers a thread
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _maps(ptr, c, G, p, inside, HW):
    """A tile (channels, positions) of the maps of a subspace in float32, -inf where it is not inside."""
    mask = (c < G)[:, None] & inside[None, :]
    return tl.load(ptr + c[:, None] * HW + p[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _neighbour(p, H, W, dy, dx):
    """Places of the neighbours at (dy, dx), and whether they lie on the map."""
    y, x = p // W + dy, p % W + dx
    return p + dy * W + dx, (p < H * W) & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _vector(ptr, c, G):
    """A number for each channel of a tile, (channels, 1) in float32."""
    return tl.load(ptr + c, mask=c < G, other=0.0).to(tl.float32)[:, None]


@triton.jit
def subspace_attention_fwd_logits_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    point_ptr,
    logits_ptr,
    g,
    G,
    H,
    W,
    SHIFTED: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    subspace = tl.program_id(0).to(tl.int64)  # of all images
    n = subspace % g
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += subspace * G * H * W
    logits = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, G, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        scale = _vector(scale_ptr + n * G, c, G)
        t = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
        for place in tl.static_range(9):
            q, inside = _neighbour(p, H, W, place // 3 - 1, place % 3 - 1)
            y = tl.where(inside[None, :], scale * _maps(x_ptr, c, G, q, inside, H * W), float("-inf"))
            t = tl.maximum(t, y, propagate_nan=tl.PropagateNan.ALL)
        if SHIFTED:
            t += _vector(shift_ptr + n * G, c, G)
        if RECTIFY:
            t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
        t = tl.where((c < G)[:, None], t, 0.0)
        logits += tl.sum(_vector(point_ptr + n * G, c, G) * t, 0)
    tl.store(logits_ptr + subspace * H * W + p, logits, mask=p < H * W)


@triton.jit
def _softmax_input(logits_ptr, mean_ptr, factor_ptr, offset_ptr, n, p, HW, NORMALISED, OFFSET, RECTIFY):
    """What the softmax is of, -inf outside the map."""
    s = tl.load(logits_ptr + p, mask=p < HW, other=0.0)
    if NORMALISED:
        s = (s - tl.load(mean_ptr + n)) * tl.load(factor_ptr + n)
    if OFFSET:
        s += tl.load(offset_ptr + n).to(tl.float32)
    if RECTIFY:
        s = tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(p < HW, s, float("-inf"))


@triton.jit
def subspace_attention_fwd_gate_kernel(
    x_ptr,
    logits_ptr,
    mean_ptr,
    factor_ptr,
    offset_ptr,
    gain_ptr,
    out_ptr,
    g,
    G,
    HW,
    NORMALISED: tl.constexpr,
    OFFSET: tl.constexpr,
    GAIN: tl.constexpr,
    RECTIFY: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    subspace = tl.program_id(0).to(tl.int64)
    n = subspace % g
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    logits_ptr += subspace * HW
    largest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, HW, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        s = _softmax_input(logits_ptr, mean_ptr, factor_ptr, offset_ptr, n, p, HW, NORMALISED, OFFSET, RECTIFY)
        new = tl.maximum(largest, s)
        finite = tl.where(new == float("-inf"), 0.0, new)  # outside so far: -inf less -inf is NaN
        total = total * tl.exp(largest - finite) + tl.exp(s - finite)
        largest = new
    top = tl.max(largest, 0)
    share = 1 / tl.sum(total * tl.exp(largest - top), 0)
    if GAIN:
        share *= tl.load(gain_ptr + n).to(tl.float32)
    if SCALED:
        share *= HW
    place = subspace * G * HW
    for first in range(0, HW, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        s = _softmax_input(logits_ptr, mean_ptr, factor_ptr, offset_ptr, n, p, HW, NORMALISED, OFFSET, RECTIFY)
        gate = 1 + share * tl.exp(s - top)
        x = _maps(x_ptr + place, c, G, p, p < HW, HW)
        mask = (c < G)[:, None] & (p < HW)[None, :]
        tl.store(out_ptr + place + c[:, None] * HW + p[None, :], x * gate[None, :], mask=mask)


@triton.jit
def subspace_attention_bwd_gate_kernel(
    grad_ptr, x_ptr, by_gate_ptr, G, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The gradient by the gate: the sum of grad x over a subspace's channels."""
    subspace = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    by_gate = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, G, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        place = subspace * G * HW
        mask = (c < G)[:, None] & (p < HW)[None, :]
        products = _maps(grad_ptr + place, c, G, p, p < HW, HW) * _maps(x_ptr + place, c, G, p, p < HW, HW)
        by_gate += tl.sum(tl.where(mask, products, 0.0), 0)
    tl.store(by_gate_ptr + subspace * HW + p, by_gate, mask=p < HW)


@triton.jit
def subspace_attention_bwd_pool_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    taken_ptr,
    by_point_ptr,
    by_shift_ptr,
    g,
    G,
    H,
    W,
    SHIFTED: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Which value each window takes; sums of slope t, and of slope where t has a gradient, over each map."""
    subspace = tl.program_id(0).to(tl.int64)
    n = subspace % g
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = subspace * G * H * W
    scale = _vector(scale_ptr + n * G, c, G)
    by_point = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    by_shift = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, H * W, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        t = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
        taken = tl.full([BLOCK_C, BLOCK_P], 0, tl.int32)
        for window in tl.static_range(9):
            q, inside = _neighbour(p, H, W, window // 3 - 1, window % 3 - 1)
            y = tl.where(inside[None, :], scale * _maps(x_ptr + place, c, G, q, inside, H * W), float("-inf"))
            taken = tl.where(y > t, window, taken)
            t = tl.maximum(t, y)
        if SHIFTED:
            t += _vector(shift_ptr + n * G, c, G)
        if RECTIFY:
            taken = tl.where(t > 0, taken, 9)
            t = tl.maximum(t, 0.0)
        mask = (c < G)[:, None] & (p < H * W)[None, :]
        slope = tl.load(slope_ptr + subspace * H * W + p, mask=p < H * W, other=0.0)[None, :]
        by_point += tl.where(mask, slope * t, 0.0)
        by_shift += tl.where(mask & (taken < 9), slope, 0.0)
        tl.store(taken_ptr + place + c[:, None] * (H * W) + p[None, :], taken.to(tl.int8), mask=mask)
    tl.store(by_point_ptr + subspace * G + c, tl.sum(by_point, 1), mask=c < G)
    tl.store(by_shift_ptr + subspace * G + c, tl.sum(by_shift, 1), mask=c < G)


@triton.jit
def subspace_attention_bwd_x_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    point_ptr,
    slope_ptr,
    gate_ptr,
    taken_ptr,
    by_x_ptr,
    by_scale_ptr,
    g,
    G,
    H,
    W,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradient by x, and for each map that by its scale."""
    subspace = tl.program_id(0).to(tl.int64)
    n = subspace % g
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = subspace * G * H * W
    scale, point = _vector(scale_ptr + n * G, c, G), _vector(point_ptr + n * G, c, G)
    by_scale = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, H * W, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        by_y = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for window in tl.static_range(9):
            # From the window around a neighbour, this pixel lies in the opposite direction.
            q, inside = _neighbour(p, H, W, window // 3 - 1, window % 3 - 1)
            mask = (c < G)[:, None] & inside[None, :]
            taken = tl.load(taken_ptr + place + c[:, None] * (H * W) + q[None, :], mask=mask, other=9)
            slope = tl.load(slope_ptr + subspace * H * W + q, mask=inside, other=0.0)
            by_y += tl.where(taken == 8 - window, slope[None, :], 0.0)
        by_y *= point
        mask = (c < G)[:, None] & (p < H * W)[None, :]
        x = _maps(x_ptr + place, c, G, p, p < H * W, H * W)
        by_scale += tl.where(mask, by_y * x, 0.0)
        gate = tl.load(gate_ptr + subspace * H * W + p, mask=p < H * W, other=0.0)
        by_x = scale * by_y + gate[None, :] * _maps(grad_ptr + place, c, G, p, p < H * W, H * W)
        tl.store(by_x_ptr + place + c[:, None] * (H * W) + p[None, :], by_x, mask=mask)
    tl.store(by_scale_ptr + subspace * G + c, tl.sum(by_scale, 1), mask=c < G)


def _launch(kernel, grid: tuple[int, int], *args, **flags: bool) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **flags, **TILE, **OPTIONS, enable_fp_fusion=True)


def _logits(x: Tensor, scale: Tensor, shift: Tensor | None, point: Tensor, rectify: bool) -> Tensor:
    """The logits (B, g, H W) of contiguous maps, in float32."""
    (B, _, H, W), (g, G) = x.shape, point.shape
    logits = x.new_empty(B, g, H * W, dtype=torch.float32)
    flags = {"SHIFTED": shift is not None, "RECTIFY": rectify}
    grid = B * g, triton.cdiv(H * W, TILE["BLOCK_P"])
    maps = (x, scale, scale if shift is None else shift, point.contiguous(), logits)
    _launch(subspace_attention_fwd_logits_kernel, grid, *maps, g, G, H, W, **flags)
    return logits


def forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    point: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    rectify: bool,
    scaled: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels. Any strides; the maps are laid out like `torch.empty_like(x)`."""
    (B, _, H, W), (g, G) = x.shape, point.shape
    dense, handed_out = x.contiguous(), _empty_logits(x, point)
    scale, shift, weight, offset, gain = _dense(scale, shift, weight, offset, gain)
    logits = _logits(dense, scale, shift, point, rectify)
    mean = factor = None
    if weight is not None:
        var, mean = torch.var_mean(logits, (0, 2), correction=0)
        factor = weight.float() * (var + eps).rsqrt()
    out = torch.empty_like(dense)
    vectors = (logits if vector is None else vector for vector in (mean, factor, offset, gain))
    flags = {"NORMALISED": weight is not None, "OFFSET": offset is not None, "GAIN": gain is not None}
    grid = B * g, triton.cdiv(G, TILE["BLOCK_C"])
    _launch(
        subspace_attention_fwd_gate_kernel,
        grid,
        *(dense, logits, *vectors, out, g, G, H * W),
        **flags,
        RECTIFY=rectify,
        SCALED=scaled,
    )
    return _laid_out_like(x, out), handed_out.copy_(logits.view(handed_out.shape))


def backward(
    grad: Tensor,
    grad_logits: Tensor | None,
    logits: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    point: Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    rectify: bool,
    scaled: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels. Any strides; the maps are laid out like `torch.empty_like(x)`."""
    (B, C, H, W), (g, G) = x.shape, point.shape
    grad, dense, point = grad.contiguous(), x.contiguous(), point.contiguous()
    scale, shift = _dense(scale, shift)
    # Those handed out in half precision are rounded, and their ReLU would take some for the other side of 0.
    if logits.dtype == torch.float32:
        l = logits.contiguous().flatten(2)
    else:
        l = _logits(dense, scale, shift, point, rectify)
    weight, offset, gain = _computed(weight, offset, gain)
    attention = _Attention(l, weight, offset, gain, rectify, scaled, eps)
    by_gate = torch.empty_like(l)
    by_positions = B * g, triton.cdiv(H * W, TILE["BLOCK_P"])
    by_channels = B * g, triton.cdiv(G, TILE["BLOCK_C"])
    _launch(subspace_attention_bwd_gate_kernel, by_positions, grad, dense, by_gate, G, H * W)
    slope, by_weight, by_offset, by_gain = attention.backward(by_gate)
    if grad_logits is not None:
        slope = slope + grad_logits.flatten(2)
    taken = torch.empty_like(dense, dtype=torch.int8)
    by_point, by_shift, by_scale = (x.new_empty(B, C, dtype=torch.float32) for _ in range(3))
    slope = slope.contiguous()
    pooled = (dense, scale, scale if shift is None else shift, slope, taken, by_point, by_shift)
    flags = {"SHIFTED": shift is not None, "RECTIFY": rectify}
    _launch(subspace_attention_bwd_pool_kernel, by_channels, *pooled, g, G, H, W, **flags)
    by_x = torch.empty_like(dense)
    collected = (grad, dense, scale, point, slope, attention.gate.contiguous(), taken, by_x, by_scale)
    _launch(subspace_attention_bwd_x_kernel, by_channels, *collected, g, G, H, W)
    return (
        _laid_out_like(x, by_x),
        by_scale.sum(0).to(x.dtype),
        (point.flatten() * by_shift).sum(0).to(x.dtype),
        by_point.sum(0).view(g, G).to(x.dtype),
        by_weight.to(x.dtype),
        by_offset.to(x.dtype),
        by_gain.to(x.dtype),
    )


def _dense(*vectors: Tensor | None) -> list:
    return [vector if vector is None else vector.contiguous() for vector in vectors]


def _laid_out_like(x: Tensor, out: Tensor) -> Tensor:
    like = torch.empty_like(x)
    return out if out.stride() == like.stride() else like.copy_(out)
