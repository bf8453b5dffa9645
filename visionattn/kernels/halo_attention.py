r"""Halo attention: blocks of queries attend to their block and a halo around it, with relative positions.

A map is cut into blocks of b x b pixels. All queries of a block share one window of keys: the block and a halo of h
pixels on each side, w = b + 2h pixels wide. Query i and key j of a window, at in-block and in-window coordinates
(i_y, i_x) and (j_y, j_x), have the logit

    l_ij = q_i . k_j / sqrt(D) + q_i . U[row(i_y, j_y)] + q_i . V[row(i_x, j_x)]
    o_i  = sum over j of softmax_j(l_ij) v_j

    q           (B, heads, D, H', W')    H' = ceil(H / s): with stride s, every s-th pixel of each axis is a query
    k           (B, heads, D, H, W)
    v           (B, heads, Dv, H, W)
    height_rel  (2w - 1, D)              U, shared by all heads
    width_rel   (2w - 1, D)              V
    out         (B, heads, Dv, H', W')   channels-last if q is, else contiguous

`index` says which row of a table belongs to a query and a key:

    "offset"   row = (w - 1) + j - s i    the true distance in pixels, up to a constant
    "timm"     row = (w - 1) + j - i      i counts subsampled queries, as in timm; the same at stride 1

`border` defines the keys outside the map; a map not divisible by b ends inside its last blocks:

        "mask"     none: such keys are excluded from the softmax
        "zero"     keys and values of zeros, which enter the softmax (timm's and the paper's padding)

Dtypes: float64, float32, bfloat16, float16, all arguments of one; half precisions are computed in float32.
Tolerance, forward and gradients, relative to the float64 result's largest magnitude, or to 1 if that is less:
    float64 1e-13, float32 1e-5, bfloat16 2e-2, float16 2e-3.
Form: chunks of blocks whose logits stay in a CPU's cache. Only the arguments are kept for the backward pass, which
recomputes the softmax.
Kernels: Triton on CUDA, for heads up to 128 wide, 16 for the gradients of float32, and windows up to 32; larger ones,
float64 and other devices use the plain form.
Exported graphs use another plain form, in `visionattn.kernels._plain.exported_halo_attention`.
Limits: b must be divisible by s.
Second derivatives, forward mode and the transforms of `torch.func` use the definition, with its memory cost.
Sources: HaloNet, arXiv 2103.12731; the relative logits are those of arXiv 1904.09925.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.errors import InputError
from visionattn.kernels._operator import check_alike, kernels_enabled, register, register_flop_formula
from visionattn.kernels._plain import halo_attention as plain
from visionattn.kernels._plain.exported_halo_attention import halo_attention_exported
from visionattn.kernels._plain.halo_attention import border_bias, empty_map, table_rows

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
    """The definition, in plain PyTorch. Windows are gathered as rows of a table of pixels."""
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
    row = table_rows(bq, w, stride, index, q.device)
    height = torch.einsum("bnmhyxd,yjd->bnmhyxj", q, height_rel[row])
    width = torch.einsum("bnmhyxd,xjd->bnmhyxj", q, width_rel[row])
    if border == "mask":
        height = height + border_bias(pixel_y - h, H, q.dtype)[:, None, None, None, None]
        width = width + border_bias(pixel_x - h, W, q.dtype)[:, None, None, None]
    relative = (height[..., None] + width[..., None, :]).reshape(B, ny * nx, heads, bq * bq, w * w)
    logits = q.reshape(B, ny * nx, heads, bq * bq, D) * D**-0.5 @ windows(k).transpose(-1, -2) + relative
    out = logits.softmax(-1) @ windows(v)  # (B, blocks, heads, bq bq, Dv)
    out = out.view(B, ny, nx, heads, bq, bq, Dv).permute(0, 3, 6, 1, 4, 2, 5).reshape(B, heads, Dv, ny * bq, nx * bq)
    return out[..., : (H + stride - 1) // stride, : (W + stride - 1) // stride]


def _check(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index, grad=None) -> None:
    tensors = {"q": q, "k": k, "v": v, "height_rel": height_rel, "width_rel": width_rel}
    check_alike("halo_attention", **tensors, **({} if grad is None else {"grad": grad}))
    if block_size < 1 or halo_size < 0 or stride < 1 or block_size % stride:
        raise InputError(
            f"halo_attention needs block_size at least 1 and divisible by stride, and halo_size at least 0; "
            f"got block_size {block_size}, stride {stride} and halo_size {halo_size}."
        )
    if border not in BORDERS or index not in INDICES:
        raise InputError(
            f"halo_attention's border must be one of {', '.join(map(repr, BORDERS))} and its index one of "
            f"{', '.join(map(repr, INDICES))}; got {border!r} and {index!r}."
        )
    given = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if q.ndim != 5 or k.ndim != 5 or v.ndim != 5:
        raise InputError(f"halo_attention takes q, k and v as (B, heads, channels, height, width); got {given}.")
    if 0 in (*k.shape[1:], v.shape[2]):
        raise InputError(f"halo_attention needs at least one head, channel and pixel; got {given}.")
    size = tuple((pixels + stride - 1) // stride for pixels in k.shape[3:])
    if q.shape[:3] != k.shape[:3] or v.shape[:2] != k.shape[:2] or v.shape[3:] != k.shape[3:] or q.shape[3:] != size:
        raise InputError(
            f"halo_attention takes q (B, heads, D, H', W'), k (B, heads, D, H, W) and v (B, heads, Dv, H, W) with "
            f"H' = ceil(H / {stride}); got {given}."
        )
    table = (2 * (block_size + 2 * halo_size) - 1, q.shape[2])
    if height_rel.shape != table or width_rel.shape != table:
        raise InputError(
            f"halo_attention takes relative tables of shape {tuple(table)}, 2 * ({block_size} + 2 * {halo_size}) - 1 "
            f"rows for block_size {block_size} and halo_size {halo_size}; got {given}."
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
    return plain.forward(*args)


@halo_attention.register_kernel("cuda")
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> Tensor:
    args = (q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    _check(*args)
    if not _use_triton(k, v, block_size + 2 * halo_size):
        return plain.forward(*args)
    from visionattn.kernels._triton import halo_attention as triton_kernels

    return triton_kernels.forward(*args)


@halo_attention.register_fake
def _(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index) -> Tensor:
    _check(q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    return empty_map(q, v.shape[2], q.shape[3:])


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
    return plain.backward(grad, *args)


@halo_attention_backward.register_kernel("cuda")
def _(grad, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index):
    args = (q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index)
    _check(*args, grad=grad)
    if not _use_triton(k, v, block_size + 2 * halo_size, backward=True):
        return plain.backward(grad, *args)
    from visionattn.kernels._triton import halo_attention as triton_kernels

    return triton_kernels.backward(grad, *args)


@halo_attention_backward.register_fake
def _(grad, q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index):
    maps = (empty_map(x, x.shape[2], x.shape[3:]) for x in (q, k, v))
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
    exported=halo_attention_exported,
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
    """Two products for each of the forward pass, as in autograd of the definition; recomputed ones do not count."""
    return 4 * sum(_products(q, k, v, block_size, halo_size, stride))
