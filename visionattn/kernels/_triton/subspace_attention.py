"""Triton kernels of `visionattn.kernels.subspace_attention`.

Forward, two passes over x: one sums the pooled channels of a subspace to its logits, one multiplies by the gate. Each
program of the second pass sums the softmax for itself, since the logits are a small part of x. Backward, the pool is
passed twice: the first kernel finds which of its nine values each window takes, one byte per window (9 where ReLU is
zero), and the second lets each pixel gather from the nine windows around it. Sums over a map are computed by its
program, sums over images by PyTorch; there are no atomic additions. Operations as small as the logits are left to
PyTorch, as in the plain form.

Maps that are not contiguous are copied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._plain.subspace_attention import Attention, computed, empty_logits

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

TILE = {"BLOCK_C": 4, "BLOCK_P": 256}  # channels and positions: 8 elements per thread
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _load_maps(ptr, offs_c, G, offs_p, inside, HW):
    """A tile (channels, positions) of the maps of a subspace in float32, -inf where it is not inside."""
    mask = (offs_c < G)[:, None] & inside[None, :]
    return tl.load(ptr + offs_c[:, None] * HW + offs_p[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _neighbour(offs_p, H, W, dy, dx):
    """Positions of the neighbours at (dy, dx), and whether they lie on the map."""
    y, x = offs_p // W + dy, offs_p % W + dx
    return offs_p + dy * W + dx, (offs_p < H * W) & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _load_vector(ptr, offs_c, G):
    """One value per channel of a tile, (channels, 1) in float32."""
    return tl.load(ptr + offs_c, mask=offs_c < G, other=0.0).to(tl.float32)[:, None]


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
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    x_ptr += subspace * G * H * W
    logits = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, G, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        scale = _load_vector(scale_ptr + n * G, offs_c, G)
        t = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
        for tap in tl.static_range(9):
            q, inside = _neighbour(offs_p, H, W, tap // 3 - 1, tap % 3 - 1)
            y = tl.where(inside[None, :], scale * _load_maps(x_ptr, offs_c, G, q, inside, H * W), float("-inf"))
            t = tl.maximum(t, y, propagate_nan=tl.PropagateNan.ALL)
        if SHIFTED:
            t += _load_vector(shift_ptr + n * G, offs_c, G)
        if RECTIFY:
            t = tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
        t = tl.where((offs_c < G)[:, None], t, 0.0)
        logits += tl.sum(_load_vector(point_ptr + n * G, offs_c, G) * t, 0)
    tl.store(logits_ptr + subspace * H * W + offs_p, logits, mask=offs_p < H * W)


@triton.jit
def _softmax_input(logits_ptr, mean_ptr, factor_ptr, offset_ptr, n, offs_p, HW, NORMALISED, OFFSET, RECTIFY):
    """The argument of the softmax, -inf outside the map."""
    s = tl.load(logits_ptr + offs_p, mask=offs_p < HW, other=0.0)
    if NORMALISED:
        s = (s - tl.load(mean_ptr + n)) * tl.load(factor_ptr + n)
    if OFFSET:
        s += tl.load(offset_ptr + n).to(tl.float32)
    if RECTIFY:
        s = tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(offs_p < HW, s, float("-inf"))


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
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    logits_ptr += subspace * HW
    m_i = tl.full([BLOCK_P], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, HW, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        s = _softmax_input(logits_ptr, mean_ptr, factor_ptr, offset_ptr, n, offs_p, HW, NORMALISED, OFFSET, RECTIFY)
        m_ij = tl.maximum(m_i, s)
        finite = tl.where(m_ij == float("-inf"), 0.0, m_ij)  # outside so far: -inf less -inf is NaN
        l_i = l_i * tl.exp(m_i - finite) + tl.exp(s - finite)
        m_i = m_ij
    maximum = tl.max(m_i, 0)
    inverse_sum = 1 / tl.sum(l_i * tl.exp(m_i - maximum), 0)
    if GAIN:
        inverse_sum *= tl.load(gain_ptr + n).to(tl.float32)
    if SCALED:
        inverse_sum *= HW
    base = subspace * G * HW
    for first in range(0, HW, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        s = _softmax_input(logits_ptr, mean_ptr, factor_ptr, offset_ptr, n, offs_p, HW, NORMALISED, OFFSET, RECTIFY)
        gate = 1 + inverse_sum * tl.exp(s - maximum)
        x = _load_maps(x_ptr + base, offs_c, G, offs_p, offs_p < HW, HW)
        mask = (offs_c < G)[:, None] & (offs_p < HW)[None, :]
        tl.store(out_ptr + base + offs_c[:, None] * HW + offs_p[None, :], x * gate[None, :], mask=mask)


@triton.jit
def subspace_attention_bwd_gate_kernel(do_ptr, x_ptr, dgate_ptr, G, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Gradient of the gate: the sum of do x over the channels of a subspace."""
    subspace = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    dgate = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, G, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        base = subspace * G * HW
        mask = (offs_c < G)[:, None] & (offs_p < HW)[None, :]
        products = _load_maps(do_ptr + base, offs_c, G, offs_p, offs_p < HW, HW) * _load_maps(
            x_ptr + base, offs_c, G, offs_p, offs_p < HW, HW
        )
        dgate += tl.sum(tl.where(mask, products, 0.0), 0)
    tl.store(dgate_ptr + subspace * HW + offs_p, dgate, mask=offs_p < HW)


@triton.jit
def subspace_attention_bwd_pool_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    dlogits_ptr,
    taken_ptr,
    dpoint_ptr,
    dshift_ptr,
    g,
    G,
    H,
    W,
    SHIFTED: tl.constexpr,
    RECTIFY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The tap that each window takes; sums over each map of dlogits t, and of dlogits where t has a gradient."""
    subspace = tl.program_id(0).to(tl.int64)
    n = subspace % g
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = subspace * G * H * W
    scale = _load_vector(scale_ptr + n * G, offs_c, G)
    dpoint = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    dshift = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, H * W, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        t = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
        taken = tl.full([BLOCK_C, BLOCK_P], 0, tl.int32)
        for tap in tl.static_range(9):
            q, inside = _neighbour(offs_p, H, W, tap // 3 - 1, tap % 3 - 1)
            y = tl.where(inside[None, :], scale * _load_maps(x_ptr + base, offs_c, G, q, inside, H * W), float("-inf"))
            taken = tl.where(y > t, tap, taken)
            t = tl.maximum(t, y)
        if SHIFTED:
            t += _load_vector(shift_ptr + n * G, offs_c, G)
        if RECTIFY:
            taken = tl.where(t > 0, taken, 9)
            t = tl.maximum(t, 0.0)
        mask = (offs_c < G)[:, None] & (offs_p < H * W)[None, :]
        dlogits = tl.load(dlogits_ptr + subspace * H * W + offs_p, mask=offs_p < H * W, other=0.0)[None, :]
        dpoint += tl.where(mask, dlogits * t, 0.0)
        dshift += tl.where(mask & (taken < 9), dlogits, 0.0)
        tl.store(taken_ptr + base + offs_c[:, None] * (H * W) + offs_p[None, :], taken.to(tl.int8), mask=mask)
    tl.store(dpoint_ptr + subspace * G + offs_c, tl.sum(dpoint, 1), mask=offs_c < G)
    tl.store(dshift_ptr + subspace * G + offs_c, tl.sum(dshift, 1), mask=offs_c < G)


@triton.jit
def subspace_attention_bwd_x_kernel(
    do_ptr,
    x_ptr,
    scale_ptr,
    point_ptr,
    dlogits_ptr,
    gate_ptr,
    taken_ptr,
    dx_ptr,
    dscale_ptr,
    g,
    G,
    H,
    W,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradient of x, and for each map the gradient of its scale."""
    subspace = tl.program_id(0).to(tl.int64)
    n = subspace % g
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = subspace * G * H * W
    scale, point = _load_vector(scale_ptr + n * G, offs_c, G), _load_vector(point_ptr + n * G, offs_c, G)
    dscale = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, H * W, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        dy = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for tap in tl.static_range(9):
            # Seen from the window around a neighbour, this pixel lies in the opposite direction.
            q, inside = _neighbour(offs_p, H, W, tap // 3 - 1, tap % 3 - 1)
            mask = (offs_c < G)[:, None] & inside[None, :]
            taken = tl.load(taken_ptr + base + offs_c[:, None] * (H * W) + q[None, :], mask=mask, other=9)
            dlogits = tl.load(dlogits_ptr + subspace * H * W + q, mask=inside, other=0.0)
            dy += tl.where(taken == 8 - tap, dlogits[None, :], 0.0)
        dy *= point
        mask = (offs_c < G)[:, None] & (offs_p < H * W)[None, :]
        x = _load_maps(x_ptr + base, offs_c, G, offs_p, offs_p < H * W, H * W)
        dscale += tl.where(mask, dy * x, 0.0)
        gate = tl.load(gate_ptr + subspace * H * W + offs_p, mask=offs_p < H * W, other=0.0)
        dx = scale * dy + gate[None, :] * _load_maps(do_ptr + base, offs_c, G, offs_p, offs_p < H * W, H * W)
        tl.store(dx_ptr + base + offs_c[:, None] * (H * W) + offs_p[None, :], dx, mask=mask)
    tl.store(dscale_ptr + subspace * G + offs_c, tl.sum(dscale, 1), mask=offs_c < G)


def _launch(kernel, grid: tuple[int, int], x: Tensor, **arguments: Any) -> None:
    with torch.cuda.device_of(x):
        kernel[grid](x_ptr=x, **arguments, **TILE, **OPTIONS, enable_fp_fusion=True)


def _sizes(x: Tensor, point: Tensor) -> dict[str, int]:
    """Sizes of the kernels that need rows and columns, by their parameter names."""
    return {"g": point.shape[0], "G": point.shape[1], "H": x.shape[2], "W": x.shape[3]}


def _logits(x: Tensor, scale: Tensor, shift: Tensor | None, point: Tensor, rectify: bool) -> Tensor:
    """The logits (B, g, H W) of contiguous maps, in float32."""
    (B, _, H, W), g = x.shape, len(point)
    logits = x.new_empty(B, g, H * W, dtype=torch.float32)
    flags = {"SHIFTED": shift is not None, "RECTIFY": rectify}
    grid = B * g, triton.cdiv(H * W, TILE["BLOCK_P"])
    _launch(
        subspace_attention_fwd_logits_kernel,
        grid,
        x,
        scale_ptr=scale,
        shift_ptr=scale if shift is None else shift,
        point_ptr=point.contiguous(),
        logits_ptr=logits,
        **_sizes(x, point),
        **flags,
    )
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
    dense, handed_out = x.contiguous(), empty_logits(x, point)
    scale, shift, weight, offset, gain = _dense(scale, shift, weight, offset, gain)
    logits = _logits(dense, scale, shift, point, rectify)
    mean = factor = None
    if weight is not None:
        var, mean = torch.var_mean(logits, (0, 2), correction=0)
        factor = weight.float() * (var + eps).rsqrt()
    out = torch.empty_like(dense)
    vectors = {"mean_ptr": mean, "factor_ptr": factor, "offset_ptr": offset, "gain_ptr": gain}
    flags = {"NORMALISED": weight is not None, "OFFSET": offset is not None, "GAIN": gain is not None}
    grid = B * g, triton.cdiv(G, TILE["BLOCK_C"])
    _launch(
        subspace_attention_fwd_gate_kernel,
        grid,
        dense,
        logits_ptr=logits,
        **{name: logits if vector is None else vector for name, vector in vectors.items()},
        out_ptr=out,
        g=g,
        G=G,
        HW=H * W,
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
    # The returned logits in half precision are rounded, and for some ReLU would be on the other side of 0.
    if logits.dtype == torch.float32:
        l = logits.contiguous().flatten(2)
    else:
        l = _logits(dense, scale, shift, point, rectify)
    weight, offset, gain = computed(weight, offset, gain)
    attention = Attention(l, weight, offset, gain, rectify, scaled, eps)
    dgate = torch.empty_like(l)
    by_positions = B * g, triton.cdiv(H * W, TILE["BLOCK_P"])
    by_channels = B * g, triton.cdiv(G, TILE["BLOCK_C"])
    _launch(subspace_attention_bwd_gate_kernel, by_positions, dense, do_ptr=grad, dgate_ptr=dgate, G=G, HW=H * W)
    dlogits, dweight, doffset, dgain = attention.backward(dgate)
    if grad_logits is not None:
        dlogits = dlogits + grad_logits.flatten(2)
    dlogits = dlogits.contiguous()
    taken = torch.empty_like(dense, dtype=torch.int8)
    dpoint, dshift, dscale = (x.new_empty(B, C, dtype=torch.float32) for _ in range(3))
    _launch(
        subspace_attention_bwd_pool_kernel,
        by_channels,
        dense,
        scale_ptr=scale,
        shift_ptr=scale if shift is None else shift,
        dlogits_ptr=dlogits,
        taken_ptr=taken,
        dpoint_ptr=dpoint,
        dshift_ptr=dshift,
        **_sizes(x, point),
        SHIFTED=shift is not None,
        RECTIFY=rectify,
    )
    dx = torch.empty_like(dense)
    _launch(
        subspace_attention_bwd_x_kernel,
        by_channels,
        dense,
        do_ptr=grad,
        scale_ptr=scale,
        point_ptr=point,
        dlogits_ptr=dlogits,
        gate_ptr=attention.gate.contiguous(),
        taken_ptr=taken,
        dx_ptr=dx,
        dscale_ptr=dscale,
        **_sizes(x, point),
    )
    return (
        _laid_out_like(x, dx),
        dscale.sum(0).to(x.dtype),
        (point.flatten() * dshift).sum(0).to(x.dtype),
        dpoint.sum(0).view(g, G).to(x.dtype),
        dweight.to(x.dtype),
        doffset.to(x.dtype),
        dgain.to(x.dtype),
    )


def _dense(*vectors: Tensor | None) -> list:
    return [vector if vector is None else vector.contiguous() for vector in vectors]


def _laid_out_like(x: Tensor, out: Tensor) -> Tensor:
    like = torch.empty_like(x)
    return out if out.stride() == like.stride() else like.copy_(out)
