"""Capabilities of the processor, for plain forms that depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["multiplies_bfloat16"]


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU with instructions that multiply it and sum in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
