"""Resampling of grids by matrices: ONNX files then take any size, and results do not depend on the exporter."""

import torch
from torch import Tensor

__all__ = ["averages", "interpolate"]


def averages(n: int, bins: int, like: Tensor) -> Tensor:
    """Matrix (bins, n) of `adaptive_avg_pool1d`."""
    i = torch.arange(bins, device=like.device)[:, None]
    j = torch.arange(n, device=like.device)
    inside = ((j >= i * n // bins) & (j < ((i + 1) * n + bins - 1) // bins)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def interpolate(cells: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation of (..., h, w) to (..., height, width), as `F.interpolate` without aligned corners."""
    rows, columns = _linear(height, cells.shape[-2], cells), _linear(width, cells.shape[-1], cells)
    return rows @ cells @ columns.transpose(0, 1)


def _linear(n: int, size: int, like: Tensor) -> Tensor:
    """Matrix (n, size) of linear interpolation; positions beyond the outer centres take their values."""
    centre = (torch.arange(n, device=like.device, dtype=like.dtype)[:, None] + 0.5) * size / n - 0.5
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    return (1 - (centre.clamp(0, size - 1) - place).abs()).clamp(min=0)
