"""Attention maps of efficient probing: the attention of each query as an overlay on the image, one panel per query."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from visionattn.errors import InputError
from visionattn.probe.heads.banks import Head, head_tokens
from visionattn.probe.heads.poolings.learned_query import PatchProbing
from visionattn.probe.tokens.interface import Tokens

__all__ = ["attention_of", "overlay"]

_PANEL = 112  # minimum length of a panel's longer side, in pixels
_GAP = 4
_OPACITY = 0.75  # of the heat map at its maximum


@torch.no_grad()
def attention_of(head: Head, tokens: Tokens) -> torch.Tensor:
    """Attention weights of a head's queries over the patches.

    Args:
        head: A head whose pooling is efficient probing.
        tokens: Tokens of B images at the head's layer.

    Returns:
        (B, M, N). With a class token among the tokens (`ep_all`), its weight is dropped, and rows sum to less than 1.

    Raises:
        InputError: The head has another pooling.
    """
    if not isinstance(head.pooling, PatchProbing):
        raise InputError(f"{type(head.pooling).__name__} has no queries to show: use a head of efficient probing.")
    weight = head.classifier.weight
    _, attention = head.pooling(
        head_tokens(tokens, head.pooling.tokens).to(weight.device, weight.dtype), return_attention=True
    )
    return attention[:, :, attention.shape[2] - tokens.patches.shape[1] :]


def _heat(values: np.ndarray) -> np.ndarray:
    """Colours from black over red to yellow: (H, W) in [0, 1] -> (H, W, 3) in [0, 255]."""
    return 255 * np.clip(2 * values[:, :, None] - np.arange(3), 0, 1)


def overlay(image: Image.Image, attention: torch.Tensor, grid: tuple[int, int]) -> Image.Image:
    """Draw each query's attention as an overlay on an image.

    Maps are upsampled bilinearly. Colours go from the grey image at the smallest weight over red to yellow at the
    largest weight. Each panel states its largest weight in units of the uniform weight 1 / N, since colours alone would
    show a nearly uniform map like a sharp one.

    Args:
        image: The image as the backbone saw it.
        attention: Attention weights of the patches, (M, N), row by row of the grid.
        grid: Height and width of the grid of patches, N = H W.

    Returns:
        An RGB image of panels, row by row: the image itself, then the queries in order, counted from 1.

    Raises:
        InputError: The shape of the attention does not match the grid.
    """
    if attention.ndim != 2 or attention.shape[1] != grid[0] * grid[1]:
        raise InputError(
            f"attention must have shape (M, {grid[0] * grid[1]}) for {grid[0]} x {grid[1]} patches; got "
            f"{tuple(attention.shape)}."
        )
    factor = max(1.0, _PANEL / max(image.size))
    width, height = (round(side * factor) for side in image.size)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[:, :, None]
    panels = [picture]
    for number, shares in enumerate(attention.detach().float().cpu().numpy(), start=1):
        low, high = float(shares.min()), float(shares.max())
        scaled = ((shares - low) / max(high - low, 1e-12)).reshape(grid)
        heat = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.BILINEAR))
        opacity = _OPACITY * heat[:, :, None]
        panel = Image.fromarray(((1 - opacity) * grey + opacity * _heat(heat)).round().astype(np.uint8))
        words = f"{number}: {high * shares.size:.1f} x"
        ImageDraw.Draw(panel).text((3, 1), words, "white", stroke_width=1, stroke_fill="black")
        panels.append(panel)
    columns = math.ceil(math.sqrt(2 * len(panels)))  # about twice as wide as high
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % columns * (width + _GAP), number // columns * (height + _GAP)))
    return sheet
