r"""Agreement of an attention map with occlusion on the same grid of patches: does the map show what a model uses?

Random masks keep each patch with probability p; the other patches are replaced by the image's mean colour. The score
of a mask is the change of the output that it causes, and the saliency of a patch is the mean score of the masks that
remove it:

    d_m = KL(p(y | x) || p(y | x masked by m))       for logits;  1 - cosine of the outputs for features
    s_i = mean of d_m over the masks without i       0 if there is none
    agreement = Pearson correlation of the map with s, over patches

Deletion removes patches in order of decreasing map value, 5 % of them per step. Insertion adds them in the same order
to an image without patches. Both report the area under 1 - d (features) or under the probability of the class that the
model predicts for the whole image (logits). A map that explains the output has a small deletion area and a large
insertion area.

Source: the saliency is that of SPES and its published code, which "Cross-attention is half explanation" compares with
attention. Removed patches carry the score: with kept patches all correlations would change sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError, shorten
from visionattn.probe.statistics import Interval, bootstrap_interval

__all__ = [
    "Agreement",
    "agreement",
    "draw_masks",
    "leave_one_out",
    "occlude",
    "occlusion_change",
    "pearson",
    "saliency",
]

STEPS = 20


@dataclass(frozen=True)
class Agreement:
    """Agreement of maps with occlusion.

    Attributes:
        pearson: Correlation per image, float64 (n,).
        deletion: Deletion area per image, float64 (n,), for the orders `"map"`, `"saliency"` and `"random"`, and for
            other maps by name.
        insertion: Insertion area per image, for the same orders.
        maps: The maps that were compared, (n, N).
        saliency: Saliency of the patches, (n, N).
    """

    pearson: np.ndarray
    deletion: dict[str, np.ndarray]
    insertion: dict[str, np.ndarray]
    maps: Tensor
    saliency: Tensor

    @property
    def mean(self) -> float:
        """Mean correlation over the images."""
        return float(self.pearson.mean())

    @property
    def interval(self) -> Interval:
        """Bootstrap interval (95 %) of the mean over the images."""
        return bootstrap_interval(self.pearson)

    def correlation(self, maps: Tensor) -> np.ndarray:
        """Correlation of other maps (n, N) of the same images with the saliency, float64 (n,)."""
        return pearson(maps.to(self.saliency), self.saliency).cpu().numpy()


def draw_masks(count: int, patches: int, keep: float = 0.5, seed: int = 0) -> Tensor:
    """Random masks of patches, true where a patch is kept, bool (count, patches)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, patches, generator=generator) < keep


def occlude(image: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replace the patches that masks do not keep with the image's mean.

    Args:
        image: (C, H, W).
        masks: Bool (n, N), N patches of the grid, row by row.
        grid: Height and width of the patches.

    Returns:
        (n, C, H, W).
    """
    kept = masks.unflatten(1, grid)[:, None].to(image)
    kept = F.interpolate(kept, size=image.shape[1:], mode="nearest")
    return image * kept + image.mean(dim=(1, 2), keepdim=True) * (1 - kept)


def occlusion_change(whole: Tensor, masked: Tensor, logits: bool) -> Tensor:
    """Change of the output under masks.

    Args:
        whole: Output for the whole image, (K,).
        masked: Outputs for the masked images, (n, K).
        logits: Whether the outputs are logits (KL divergence) or features (1 - cosine).

    Returns:
        (n,).
    """
    if not logits:
        return 1 - F.cosine_similarity(whole[None], masked, dim=1)
    log_p, log_q = whole.log_softmax(-1), masked.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def saliency(changes: Tensor, masks: Tensor) -> Tensor:
    """Mean change over the masks that remove a patch: (n,), bool (n, N) -> (N,); 0 if no mask removes it."""
    removed = (~masks).to(changes)
    return changes @ removed / removed.sum(dim=0).clamp_min(1)


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation over the last axis; 0 if either input is constant."""
    one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
    return F.cosine_similarity(one.double(), other.double(), dim=-1)


@torch.no_grad()
def leave_one_out(predict: Callable[[Tensor], Tensor], image: Tensor, grid: tuple[int, int], logits: bool) -> Tensor:
    """Change of the output when a single patch is removed, (N,): N forward passes, a cheap option for small grids."""
    masks = ~torch.eye(grid[0] * grid[1], dtype=torch.bool)
    return occlusion_change(predict(image[None])[0], predict(occlude(image, masks, grid)), logits)


@torch.no_grad()
def agreement(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    *,
    logits: bool,
    masks: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    others: Mapping[str, Tensor] | None = None,
) -> Agreement:
    """Compare maps over patches with occlusion (see the module).

    Args:
        predict: Images (n, C, H, W) -> logits or features (n, K).
        images: (n, C, H, W).
        maps: Maps over the patches, row by row, (n, N), such as the attention of the class token.
        grid: Height and width of the grid of patches.
        logits: Whether `predict` returns logits; otherwise features.
        masks: Number of random masks; each needs a forward pass.
        seed: Seed of the masks and of the random order, which is the control.
        batch_size: Number of masked images per forward pass.
        others: Further maps (n, N) by name, whose areas are measured as well.

    Raises:
        InputError: The shapes of maps, grid and images do not match, or there are fewer than 2 masks.
    """
    patches = grid[0] * grid[1]
    judged = {"map": maps, **(others or {})}
    for values in judged.values():
        if values.shape != (len(images), patches) or not len(images):
            raise InputError(
                f"maps must have shape ({len(images)}, {patches}) for {len(images)} images of {grid[0]} x {grid[1]} "
                f"patches; got {tuple(values.shape)}."
            )
    if masks < 2:
        raise InputError(f"masks must be at least 2; got {shorten(masks)}.")
    drawn = draw_masks(masks, patches, seed=seed).to(images.device)
    noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(seed)).to(maps)
    found = []
    areas: dict[str, list[tuple[float, float]]] = {name: [] for name in (*judged, "saliency", "random")}
    for number, image in enumerate(images):
        whole = predict(image[None])[0]
        changes = torch.cat(
            [occlusion_change(whole, predict(occlude(image, part, grid)), logits) for part in drawn.split(batch_size)]
        )
        found.append(saliency(changes, drawn))
        orders = {name: values[number] for name, values in judged.items()}
        for name, ranked in {**orders, "saliency": found[-1], "random": noise[number]}.items():
            areas[name].append(_areas(predict, image, ranked, grid, whole, logits))
    salient = torch.stack(found)
    return Agreement(
        pearson(maps, salient).cpu().numpy(),
        {name: np.array([deletion for deletion, _ in some]) for name, some in areas.items()},
        {name: np.array([insertion for _, insertion in some]) for name, some in areas.items()},
        maps,
        salient,
    )


def _areas(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    values: Tensor,
    grid: tuple[int, int],
    whole: Tensor,
    logits: bool,
) -> tuple[float, float]:
    """Areas under the deletion curve and the insertion curve of one map."""
    rank = values.argsort(descending=True).argsort()  # 0: the highest
    counts = (torch.arange(STEPS + 1, device=rank.device) * len(rank) / STEPS).round()[:, None]
    masks = torch.cat([rank >= counts, rank < counts])
    outputs = predict(occlude(image, masks, grid))
    kept = outputs.softmax(-1)[:, whole.argmax()] if logits else 1 - occlusion_change(whole, outputs, logits)
    deletion, insertion = (torch.trapezoid(curve.double(), dx=1 / STEPS) for curve in kept.chunk(2))
    return float(deletion), float(insertion)
