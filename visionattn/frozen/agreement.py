r"""Does an attention map say what a model uses? Its agreement with occlusion on the same grid of patches.

Random masks keep each patch with probability p, the others are replaced by the image's mean colour. A mask's score is
what it changes, and a patch's saliency the mean score of the masks that take it away:

    d_m = KL(p(y | x) || p(y | x masked by m))       of logits;  1 - cosine of the outputs where these are features
    s_i = mean of d_m over the masks without i       0 where none is
    agreement = Pearson correlation of the map with s, over patches

Deletion takes patches away from the highest value of a map on, 5 % of them at a time, and insertion brings them back to
an image without any; both report the area under 1 - d (features) or under the probability of the model's own class
(logits). A map that explains has a small deletion and a large insertion area.

Source: the saliency is that of SPES and its published code, which "Cross-attention is half explanation" compares with
attention. Removed patches carry the score: with kept ones all correlations would change their sign.
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
    """How a map agrees with occlusion.

    Attributes:
        pearson: Correlation of each image, float64 (n,).
        deletion: Area of each image by the map, by other maps, by the saliency itself and by random values,
            float64 (n,).
        insertion: Likewise.
        maps: The maps that were judged, (n, N).
        saliency: Of each image, (n, N).
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
    """Masks of patches, true where kept, bool (count, patches)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, patches, generator=generator) < keep


def occlude(image: Tensor, masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replace the patches that masks do not keep by the image's mean.

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
    """How much outputs changed.

    Args:
        whole: Output of the whole image, (K,).
        masked: Outputs of its masks, (n, K).
        logits: Whether they are logits: KL divergence; otherwise 1 - cosine.

    Returns:
        (n,).
    """
    if not logits:
        return 1 - F.cosine_similarity(whole[None], masked, dim=1)
    log_p, log_q = whole.log_softmax(-1), masked.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def saliency(changes: Tensor, masks: Tensor) -> Tensor:
    """Mean change of the masks that take a patch away: (n,), bool (n, N) -> (N,); 0 where none does."""
    removed = (~masks).to(changes)
    return changes @ removed / removed.sum(dim=0).clamp_min(1)


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation over the last axis, 0 where one is constant."""
    one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
    return F.cosine_similarity(one.double(), other.double(), dim=-1)


@torch.no_grad()
def leave_one_out(predict: Callable[[Tensor], Tensor], image: Tensor, grid: tuple[int, int], logits: bool) -> Tensor:
    """Change of the output as each patch alone is taken away, (N,): N passes, the cheap alternative for small grids."""
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
        maps: Such as the attention of the class token, (n, N) over the patches, row by row.
        grid: Height and width of the patches.
        logits: What `predict` gives.
        masks: Random masks; each is a pass.
        seed: Of the masks and of the random order, the control.
        batch_size: Masked images at once.
        others: Further maps (n, N) by name, whose areas are measured as well.

    Raises:
        InputError: Maps, grid and images do not fit, or there are too few masks.
    """
    patches = grid[0] * grid[1]
    judged = {"map": maps, **(others or {})}
    for values in judged.values():
        if values.shape != (len(images), patches) or not len(images):
            raise InputError(
                f"Maps of {len(images)} images over {grid[0]} x {grid[1]} patches are ({len(images)}, {patches}); got "
                f"{tuple(values.shape)}."
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
    """Areas under the deletion and the insertion curve of one map."""
    rank = values.argsort(descending=True).argsort()  # 0: the highest
    counts = (torch.arange(STEPS + 1, device=rank.device) * len(rank) / STEPS).round()[:, None]
    masks = torch.cat([rank >= counts, rank < counts])
    outputs = predict(occlude(image, masks, grid))
    kept = outputs.softmax(-1)[:, whole.argmax()] if logits else 1 - occlusion_change(whole, outputs, logits)
    deletion, insertion = (torch.trapezoid(curve.double(), dx=1 / STEPS) for curve in kept.chunk(2))
    return float(deletion), float(insertion)
