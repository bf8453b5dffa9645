"""The plain form of `visionattn.kernels.subspace_attention` for CPUs.

It works on contiguous maps. No operation works on 3 x 3 windows: shifted whole maps are compared, in long runs of
memory that the processor handles 8 or 16 elements at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

__all__ = ["Attention", "backward", "computed", "empty_logits", "forward"]

# Elements of the maps of a chunk, for at least one subspace of an image. On CPUs the dozen maps of half a MiB of a
# chunk fit in a core's caches; on other devices, starting an operation costs more than missing a cache.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**17, 2**26

_Chunk = tuple[slice, slice]  # images, subspaces


def _chunks(x: Tensor) -> Iterator[_Chunk]:
    """Cut maps by subspaces (B, g, G, H, W) into chunks."""
    wanted = _CHUNK_ON_CPU if x.device.type == "cpu" else _CHUNK_ELSEWHERE
    B, g = x.shape[:2]
    room = max(1, wanted // max(1, x.shape[2:].numel()))  # subspaces
    images, subspaces = max(1, room // g), min(g, room)
    for image, subspace in product(range(0, B, images), range(0, g, subspaces)):
        yield slice(image, image + images), slice(subspace, subspace + subspaces)


def computed(*tensors: Tensor | None) -> list:
    """Tensors in the dtype of the computation, contiguous, since results of broadcasting inherit their strides."""
    half = (torch.bfloat16, torch.float16)
    return [
        tensor if tensor is None else (tensor.float() if tensor.dtype in half else tensor).contiguous()
        for tensor in tensors
    ]


def _run(x: Tensor) -> Tensor:
    """Maps (..., H, W) as contiguous runs (..., H W) in the dtype of the computation, copied if necessary."""
    return computed(x.contiguous())[0].flatten(-2)


def _largest_of_columns(x: Tensor) -> Tensor:
    """The maximum of each value and its neighbours left and right, (P, H, W) -> the same.

    The maps are compared as one long row, then their first and last columns are corrected.
    """
    if x.shape[2] == 1:
        return x
    out, run = torch.empty_like(x), x.view(-1)
    torch.maximum(run[1:], run[:-1], out=out.view(-1)[1:])
    torch.maximum(out.view(-1)[1:-1], run[2:], out=out.view(-1)[1:-1])
    torch.maximum(x[..., 0], x[..., 1], out=out[..., 0])
    torch.maximum(x[..., -2], x[..., -1], out=out[..., -1])
    return out


def _largest_of_rows(x: Tensor) -> Tensor:
    """The maximum of each value and its neighbours above and below, (P, H, W) -> the same."""
    if x.shape[1] == 1:
        return x
    out = torch.empty_like(x)
    out[:, 0] = x[:, 0]
    torch.maximum(x[:, 1:], x[:, :-1], out=out[:, 1:])
    torch.maximum(out[:, :-1], x[:, 1:], out=out[:, :-1])
    return out


def _give_to(target: Tensor, share: Tensor, equal: Tensor) -> None:
    """Move the entries of `share` where `equal` is 1 to `target`."""
    equal *= share
    share -= equal
    target += equal


def _back_through_rows(grad: Tensor, x: Tensor, largest: Tensor) -> Tensor:
    """The gradient of `_largest_of_rows` for x; `grad` is overwritten. The first of equal rows receives it."""
    if x.shape[1] == 1:
        return grad
    out = torch.zeros_like(x)
    _give_to(out[:, :-1], grad[:, 1:], largest[:, 1:].clone().eq_(x[:, :-1]))
    _give_to(out, grad, largest.clone().eq_(x))
    out[:, 1:] += grad[:, :-1]
    return out


def _back_through_columns(grad: Tensor, x: Tensor, largest: Tensor) -> Tensor:
    """The gradient of `_largest_of_columns` for x; `grad` is overwritten. The first of equal columns receives it."""
    if x.shape[2] == 1:
        return grad
    out = torch.zeros_like(x)
    equal = largest.clone()
    equal.view(-1)[1:].eq_(x.view(-1)[:-1])
    equal[..., 0] = 0  # its left neighbour in the long row belongs to another row of the map
    _give_to(out.view(-1)[:-1], grad.view(-1)[1:], equal.view(-1)[1:])
    _give_to(out, grad, largest.clone().eq_(x))
    out.view(-1)[1:] += grad.view(-1)[:-1]
    return out


class _Pooled:
    """The pooled maps t of a chunk, and their backward pass."""

    def __init__(self, x: Tensor, scale: Tensor, shift: Tensor | None, rectify: bool) -> None:
        self.x, self.scale, self.rectify = _run(x), scale.unsqueeze(2), rectify  # (b, n, G, H W), (n, G, 1)
        self.y = (self.x * self.scale).view(-1, *x.shape[3:])
        self.rows = _largest_of_columns(self.y)
        self.largest = _largest_of_rows(self.rows)
        t = self.largest.view(self.x.shape)
        # A common shift does not change which value is the largest, nor does ReLU.
        t = t if shift is None else t + shift.unsqueeze(2)
        self.t = t.relu() if rectify else t

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x (b, n, G, H W), scale and shift (n, G), from that of t, which is overwritten."""
        if self.rectify:
            torch.ops.aten.threshold_backward.grad_input(grad, self.t, 0, grad_input=grad)
        by_shift = grad.sum((0, 3))
        by_rows = _back_through_rows(grad.view(self.y.shape), self.rows, self.largest)
        by_y = _back_through_columns(by_rows, self.y, self.rows).view(self.x.shape)
        by_scale = (by_y * self.x).sum((0, 3))
        return by_y.mul_(self.scale), by_scale, by_shift


class Attention:
    """From the logits of all images (B, g, H W) to the factor of x, and the backward pass."""

    def __init__(self, logits, weight, offset, gain, rectify: bool, scaled: bool, eps: float) -> None:
        self.weight, self.gain, self.rectify = weight, gain, rectify
        self.factor = logits.shape[2] if scaled else 1
        s = logits
        if weight is not None:
            var, mean = torch.var_mean(s, (0, 2), correction=0, keepdim=True)
            self.inverse = (var + eps).rsqrt()  # of the deviation
            self.normal = (s - mean) * self.inverse
            s = self.normal * weight[:, None]
        s = s if offset is None else s + offset[:, None]
        self.s = s.relu() if rectify else s
        self.weights = self.s.softmax(-1)
        gate = self.weights * self.factor
        self.gate = (gate if gain is None else gate * gain[:, None]).add_(1).unsqueeze(2)  # (B, g, 1, H W)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of the logits, weight, offset and gain, from that of the gate (B, g, H W)."""
        by_gain = (grad * self.weights).sum((0, 2)) * self.factor
        grad = grad * (self.factor if self.gain is None else self.factor * self.gain[:, None])
        grad = torch.ops.aten._softmax_backward_data(grad, self.weights, -1, grad.dtype)
        if self.rectify:
            grad = torch.ops.aten.threshold_backward(grad, self.s, 0)
        by_offset, by_weight = grad.sum((0, 2)), torch.zeros_like(by_gain)
        if self.weight is not None:
            by_weight = (grad * self.normal).sum((0, 2))
            count = grad.shape[0] * grad.shape[2]
            grad = grad - (by_offset[:, None] + self.normal * by_weight[:, None]) / count
            grad = grad * self.inverse * self.weight[:, None]
        return grad, by_weight, by_offset, by_gain


def _logits(maps: Tensor, scale: Tensor, shift: Tensor | None, point: Tensor, rectify: bool) -> Tensor:
    """The logits of maps by subspaces, (B, g, H W) in the dtype of the computation."""
    l = point.new_empty(*maps.shape[:2], maps.shape[3:].numel())
    for chunk in _chunks(maps):
        n = chunk[1]
        t = _Pooled(maps[chunk], scale[n], shift if shift is None else shift[n], rectify).t
        l[chunk] = (point[n].unsqueeze(1) @ t).squeeze(2)
    return l


def forward(x, scale, shift, point, weight, offset, gain, rectify, scaled, eps) -> tuple[Tensor, Tensor]:
    g = point.shape[0]
    maps, out, logits = x.unflatten(1, (g, -1)), torch.empty_like(x), empty_logits(x, point)
    scale, shift, point, weight, offset, gain = computed(scale, shift, point, weight, offset, gain)
    scale, shift = _by_subspace(g, scale, shift)
    l = _logits(maps, scale, shift, point, rectify)
    gate = Attention(l, weight, offset, gain, rectify, scaled, eps).gate.unflatten(3, x.shape[2:])
    targets = out.unflatten(1, (g, -1))
    for chunk in _chunks(maps):
        targets[chunk] = maps[chunk] * gate[chunk]
    return out, logits.copy_(l.view(logits.shape))


def backward(
    grad, grad_logits, logits, x, scale, shift, point, weight, offset, gain, rectify, scaled, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of all tensors from x on, including absent ones."""
    g = point.shape[0]
    grads, maps, by_x = grad.unflatten(1, (g, -1)), x.unflatten(1, (g, -1)), torch.empty_like(x)
    scale, shift, point, weight, offset, gain = computed(scale, shift, point, weight, offset, gain)
    scale, shift = _by_subspace(g, scale, shift)
    # The returned logits in half precision are rounded, and for some ReLU would be on the other side of 0.
    l = _run(logits) if logits.dtype == point.dtype else _logits(maps, scale, shift, point, rectify)
    attention = Attention(l, weight, offset, gain, rectify, scaled, eps)
    by_gate = torch.empty_like(l)
    for chunk in _chunks(maps):
        by_gate[chunk] = (_run(grads[chunk]) * _run(maps[chunk])).sum(2)
    by_logits, by_weight, by_offset, by_gain = attention.backward(by_gate)
    if grad_logits is not None:
        by_logits = by_logits + _run(grad_logits)
    by_scale, by_shift, by_point = torch.zeros_like(point), torch.zeros_like(point), torch.zeros_like(point)
    targets = by_x.unflatten(1, (g, -1))
    for chunk in _chunks(maps):
        n, slope = chunk[1], by_logits[chunk]
        pooled = _Pooled(maps[chunk], scale[n], shift if shift is None else shift[n], rectify)
        by_point[n] += (pooled.t @ slope.unsqueeze(-1)).sum((0, 3))
        by_maps, of_scale, of_shift = pooled.backward(point[n].unsqueeze(-1) * slope.unsqueeze(2))
        by_scale[n] += of_scale
        by_shift[n] += of_shift
        by_maps.addcmul_(_run(grads[chunk]), attention.gate[chunk])
        targets[chunk] = by_maps.view(targets[chunk].shape)
    by_vectors = (by_weight.to(x.dtype), by_offset.to(x.dtype), by_gain.to(x.dtype))
    return by_x, by_scale.flatten().to(x.dtype), by_shift.flatten().to(x.dtype), by_point.to(x.dtype), *by_vectors


def _by_subspace(g: int, *vectors: Tensor | None) -> list:
    return [vector if vector is None else vector.view(g, -1) for vector in vectors]


def empty_logits(x: Tensor, point: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], point.shape[0], x.shape[2], x.shape[3])
