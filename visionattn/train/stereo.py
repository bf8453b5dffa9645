r"""Training stereo matching and optical flow: models of the tasks "stereo" and "flow".

A forward pass returns fields f_1 .. f_J of both views in this order: after the self- and the cross-attention of
each layer, and after each upsampling, each in pixels of its own map, of stride k_j; the field f at full resolution;
and the probabilities P of the initial match. The ground truth is t, with y = 0 in stereo, for both views if both are
known.

    L = sum over j of g^(J - j) L_j / sum over j of g^(J - j)  +  L_full  +  c L_both  +  s L_start       g = 0.9

    L_j     = mean over K_j of r(f_j - t_k)       r(e) = sqrt(|e|^2 + 0.1^2) - 0.1
    L_full  = mean over the pixels with ground truth of r((f - t) / 4)
    L_both  = mean over V of r((f(p) + f~(p + f(p))) / 4)                                  f~: the other view's field
    L_start = mean over K of the cross entropy of P with t at 1/32, spread over the integer pixels around it

t_k is the ground truth of a map of stride k: of each k x k pixels, the mean of those within k of their median, divided
by k. K_j are the pixels that have it, for fields after cross-attention only the non-occluded ones; V are the pixels
whose match points back to them within 2 pixels and which are not occluded in the ground truth. Reasons for each term:

- r is quadratic near 0 and linear far away, so that outliers, which occur at every outline, do not dominate.
- Fields are measured in pixels of their own map, since a layer cannot be more precise than a fraction of one, and the
  full-resolution field in those of the 1/4 map that it is upsampled from, so that no resolution dominates. Weights
  rise, because early fields serve later ones.
- A plain mean over k x k pixels lies between two surfaces at an outline, on neither.
- Cross-attention searches for a pixel's match. An occluded pixel has none, and a loss there would
  teach to match something else. Self-attention can fill such pixels from their neighbours: its fields have a
  loss everywhere.
- The other terms judge each view's field separately. L_both ties them, needs no ground truth, and so reaches the pixels
  that sparse ground truth leaves out.
- The initial match is read off P around its largest entry. If that is wrong, no gradient corrects it: L_start does.

The paper (arXiv 2510.14260) mentions a consistency-constrained loss without stating it; this one is our own.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric

from visionattn.blocks.match_decoder import exchange_views, visible_pixels
from visionattn.checkpoints import create
from visionattn.data.samplers import IGNORED
from visionattn.errors import ConfigError
from visionattn.metrics.matching import disparity_errors, flow_errors
from visionattn.models.match_stereo import MatchFields
from visionattn.train.optimization import OptimizedTask

__all__ = ["MatchTask", "coarse_truth"]

RISE = 0.9
SOFTNESS = 0.1
STRIDES = (4, 8, 16, 32)
LAST_STRIDE = STRIDES[0]
MEASURES = ("epe", "bad_0_5", "bad_1", "bad_2", "bad_4", "d1")
REGIONS = ("all", "nonocc")
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def robust(difference: torch.Tensor) -> torch.Tensor:
    """r, (..., 2) -> (...)."""
    return (difference.square().sum(-1) + SOFTNESS**2).sqrt() - SOFTNESS


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values where the mask is true; 0 if it is true nowhere."""
    # Values are selected, not multiplied: where the ground truth is unknown they may be NaN, and so would be gradients.
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def coarse_truth(truth: torch.Tensor, seen: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ground truth of a map of stride k (equation: see the module).

    Args:
        truth: (B, H, W, 2) in pixels, NaN where unknown; H and W multiples of k.
        seen: bool (B, H, W), non-occluded pixels.
        stride: k.

    Returns:
        t_k (B, H / k, W / k, 2) in pixels of the map, NaN where no pixel has ground truth; and bool (B, H / k, W / k),
        where most of the averaged pixels are non-occluded.
    """
    B, H, W = seen.shape
    blocks = truth.view(B, H // stride, stride, W // stride, stride, 2).permute(0, 1, 3, 5, 2, 4).flatten(-2)
    median = blocks.nanmedian(-1, keepdim=True).values  # (B, h, w, 2, 1)
    near = ((blocks - median).abs() <= stride).all(-2)  # (B, h, w, k k), False for NaN
    count = near.sum(-1)
    total = torch.where(near.unsqueeze(-2), blocks, 0).sum(-1)
    mean = total / count.unsqueeze(-1) / stride  # 0 / 0 is NaN
    shown = seen.view(B, H // stride, stride, W // stride, stride).transpose(2, 3).flatten(-2)
    return mean, 2 * (near & shown).sum(-1) > count


def there_and_back(field: torch.Tensor) -> torch.Tensor:
    """f(p) + f~(p + f(p)), bilinear and differentiable in both, (2B, H, W, 2) -> (2B, H, W, 2)."""
    H, W = field.shape[1:3]
    x, y = torch.arange(W, device=field.device), torch.arange(H, device=field.device).unsqueeze(1)
    grid = torch.stack([(x + field[..., 0]) * (2 / (W - 1)) - 1, (y + field[..., 1]) * (2 / (H - 1)) - 1], -1)
    other = exchange_views(field).permute(0, 3, 1, 2)
    return field + F.grid_sample(other, grid, padding_mode="border", align_corners=True).permute(0, 2, 3, 1)


def start_loss(probability: torch.Tensor, truth: torch.Tensor, known: torch.Tensor, flow: bool) -> torch.Tensor:
    """Cross entropy of the initial match's probabilities with the ground truth at 1/32.

    Args:
        probability: P of `MatchFields`.
        truth: (2B, h, w, 2) in pixels of the map.
        known: bool (2B, h, w), pixels to use.
        flow: Whether P is over pixels of the other view instead of disparities.
    """
    h, w = truth.shape[1:3]
    truth = torch.where(known.unsqueeze(-1), truth, 0)
    if flow:
        own_x, own_y = torch.arange(w, device=truth.device), torch.arange(h, device=truth.device).unsqueeze(1)
        place_x, place_y = (truth[..., 0] + own_x).clamp(0, w - 1), (truth[..., 1] + own_y).clamp(0, h - 1)
        probability = probability.unflatten(1, (h, w))
    else:
        place_x, place_y = truth[..., 0].abs().clamp(max=w - 1), torch.zeros_like(truth[..., 0])
    entropy = torch.zeros_like(place_x)
    low_x, low_y = place_x.floor(), place_y.floor()
    for dy in (0, 1) if flow else (0,):
        for dx in (0, 1):
            share = (1 - (place_x - low_x - dx).abs()) * (1 - (place_y - low_y - dy).abs())
            index = (low_y + dy).clamp(max=h - 1) * w + (low_x + dx).clamp(max=w - 1)
            p = probability.gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
            entropy = entropy - share * p.clamp(min=1e-6).log()
    return masked_mean(entropy, known)


class MatchTask(OptimizedTask):
    """A model that matches two views, and its training (loss: see the module).

    Args:
        name: Name of the model in timm's registry, for the task "stereo" or "flow".
        model_args: Further arguments of the model, such as `depths`.
        pretrained: Start from the published weights.
        mask_occluded: Leave occluded pixels out of the loss of fields after cross-attention.
        consistency: c, weight of the consistency between the views.
        start: s, weight of the initial match's cross entropy.
        grad_checkpointing: Recompute each decoder layer in the backward pass instead of keeping its activations.
        **optimization: Arguments of `OptimizedTask`.
    """

    monitor = "val/within_2"
    """Percentage of pixels within 2 pixels of the ground truth."""

    def __init__(
        self,
        name: str = "va_match_stereo_nano",
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        mask_occluded: bool = True,
        consistency: float = 0.1,
        start: float = 1.0,
        lr: float = 4e-4,
        weight_decay: float = 1e-4,
        grad_checkpointing: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, **optimization)
        if consistency < 0 or start < 0:
            raise ConfigError("model.consistency and model.start must be at least 0.")
        self.net = create(name, pretrained=pretrained, **(model_args or {}))
        net: Any = self.net
        if getattr(net, "task", None) not in ("stereo", "flow"):
            raise ConfigError(f"model.name must be a model of the task 'stereo' or 'flow'; got {name!r}.")
        if grad_checkpointing:
            net.set_grad_checkpointing()
        self.flow: bool = net.task == "flow"
        self.val_errors, self.test_errors = (
            nn.ModuleDict({f"{region}_{measure}": MeanMetric() for region in REGIONS for measure in MEASURES})
            for _ in range(2)
        )

    def forward(self, views: torch.Tensor) -> MatchFields:
        """Both views, RGB in 0..1, (B, 2, 3, H, W) -> all fields."""
        net: Any = self.net
        return net.forward_fields(views[:, 0], views[:, 1])

    def losses(self, found: MatchFields, truth: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        """The unweighted terms of the loss: sequence, full, both, start.

        Args:
            found: Fields of views whose sides are multiples of 32.
            truth: (2B, H, W, 2) in pixels, left views first, NaN where unknown.
            seen: bool (2B, H, W), non-occluded pixels.
        """
        net: Any = self.net
        border = (getattr(net, "border", 0),) * 2  # nothing is known of the columns that a network adds
        extended = F.pad(truth, (0, 0, *border), value=float("nan")), F.pad(seen, border, value=False)
        W = extended[0].shape[2]
        coarse = {stride: coarse_truth(*extended, stride) for stride in STRIDES}
        # In the order in which they come: an upsampled field comes before the first layer of its resolution.
        waiting = {W // field.shape[2]: field for field in found.upsampled}
        fields: list[tuple[torch.Tensor, bool]] = []
        for after_self, after_cross in zip(found.after_self, found.after_cross):
            upsampled = waiting.pop(W // after_self.shape[2], None)
            fields += [] if upsampled is None else [(upsampled, False)]
            fields += [(after_self, False), (after_cross, self.hparams.mask_occluded)]
        sequence, weights = truth.new_zeros(()), 0.0
        for behind, (field, masked) in enumerate(reversed(fields)):
            wanted, shown = coarse[W // field.shape[2]]
            known = wanted.isfinite().all(-1)
            error = robust(field - wanted.nan_to_num())
            sequence = sequence + RISE**behind * masked_mean(error, known & shown if masked else known)
            weights += RISE**behind
        known = truth.isfinite().all(-1)
        terms = {
            "sequence": sequence / weights,
            "full": masked_mean(robust((found.field - truth.nan_to_num()) / LAST_STRIDE), known),
        }
        agreed = visible_pixels(found.field).squeeze(-1).bool() & (seen | ~known)
        terms["both"] = masked_mean(robust(there_and_back(found.field) / LAST_STRIDE), agreed)
        wanted, shown = coarse[32]
        if found.probability is not None:
            terms["start"] = start_loss(found.probability, wanted, wanted.isfinite().all(-1) & shown, self.flow)
        return terms

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Loss of one batch."""
        views, truth, seen = batch[0] / 255, *(_stacked(part) for part in batch[1:3])
        found = self(views)
        terms = self.losses(found, truth, seen)
        given = self.hparams
        loss = terms["sequence"] + terms["full"] + given.consistency * terms["both"] + given.start * terms["start"]
        with torch.no_grad():
            error = (found.field - truth.nan_to_num()).norm(dim=-1)
            epe = masked_mean(error, truth.isfinite().all(-1))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/epe", epe, prog_bar=True)
        self.log_dict({f"train/{term}": value for term, value in terms.items()})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Errors of the left or first view."""
        self._measure(batch, self.val_errors)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._state("val", self.val_errors)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Errors of the left or first view."""
        self._measure(batch, self.test_errors)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._state("test", self.test_errors)

    def _measure(self, batch: Batch, means: Any) -> None:
        views, truths, seens, numbers = batch
        fields = self(views / 255).field[: len(views)].float().cpu().numpy()
        for field, truth, seen, number in zip(fields, truths[:, 0].cpu().numpy(), seens[:, 0].cpu().numpy(), numbers):
            if number == IGNORED:
                continue
            for region, mask in (("all", None), ("nonocc", seen)):
                if mask is not None and not mask.any():
                    continue
                if self.flow:
                    errors = flow_errors(field, truth, mask)
                else:
                    errors = disparity_errors(-field[..., 0].clip(max=0), -truth[..., 0], mask)
                for measure in MEASURES:
                    means[f"{region}_{measure}"].update(asdict(errors)[measure])

    def _state(self, part: str, means: Any) -> None:
        for name, mean in means.items():
            self.log(f"{part}/{name.removeprefix('all_')}", mean, prog_bar=name == "all_epe")
        self.log(f"{part}/within_2", 100 - means["all_bad_2"].compute())


def _stacked(both: torch.Tensor) -> torch.Tensor:
    """(B, 2, ...) -> (2B, ...), left views first."""
    return both.transpose(0, 1).flatten(0, 1)
