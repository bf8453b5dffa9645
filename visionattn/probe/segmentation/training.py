"""Training and test of segmentation heads.

All heads of a run train together: the tokens of a batch are read once. The loss is the cross-entropy of the logits
interpolated to `DETAIL` times the grid of tokens, ignoring pixels without a class; AdamW, warm-up, then cosine decay to
0. Learning rate, weight decay and seed are selected by the mIoU on held-out training images after the last epoch, whose
weights are used. The test images are read after the selection, each at the resolution of its mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from visionattn.data.segment.masks import IGNORE
from visionattn.metrics.segmentation import count_boundary, count_pixels, mean_iou
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.segmentation.heads import LinearSegmenter, create_segmenter, interpolate, predict_masks
from visionattn.probe.task_run import divide
from visionattn.probe.tokens.interface import Features

__all__ = ["DETAIL", "SegmenterResult", "score_segmenter", "train_segmenters"]

DETAIL = 4


@dataclass
class SegmenterResult:
    """A head after its training.

    Attributes:
        spec: Settings of the head; `pooling` is its name.
        layer: Name of its layer.
        head: The head, in evaluation mode.
        held_out: mIoU on the held-out images; NaN if none are held out, or for a head that diverged.
        diverged: Epoch in which its loss became infinite or NaN; 0 if it never did.
        pixels: Pixel counts of each test image (n, 3, K), for selected heads.
        boundaries: Counts of pixels near boundaries, in the same form.
    """

    spec: HeadSpec
    layer: str
    head: LinearSegmenter
    held_out: float = math.nan
    diverged: int = 0
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))
    boundaries: Tensor = field(default_factory=lambda: torch.empty(0))


def train_segmenters(
    train: Features,
    masks: Tensor,
    specs: Sequence[HeadSpec],
    *,
    epochs: int,
    batch_size: int,
    warmup_epochs: float,
    holdout: float,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[list[SegmenterResult], int]:
    """Train heads together.

    Args:
        train: Tokens of the training images; its classes are those of the pixels.
        masks: Classes of their pixels, uint8 (n, h, w), at `DETAIL` times the grid.
        specs: Settings of the heads.
        epochs: Passes over the training images.
        batch_size: Images per step.
        warmup_epochs: Epochs in which the learning rate rises from 0.
        holdout: Share of the images that is held out for selection.
        device: Device on which heads are trained.
        progress: Display of the progress bar.

    Returns:
        The heads, and the number of images that were held out.

    Raises:
        DataError: There are too few images.
    """
    rows, held_rows = divide(len(train), holdout)
    results = []
    for spec in specs:
        layer = train.layers[spec.layer]
        head = create_segmenter(spec.pooling, layer.dim, len(train.classes), spec.seed).to(device)
        results.append(SegmenterResult(spec, layer.name, head))
    optimizers = [_optimizer(result) for result in results]
    batch_size = min(batch_size, len(rows))
    steps = len(rows) // batch_size
    bar = progress.add_task("heads", total=epochs * steps) if progress is not None else None
    for epoch in range(epochs):
        shuffled = rows[torch.from_numpy(np.random.default_rng((0, epoch)).permutation(len(rows)))]
        for step, (some, tokens) in enumerate(train.batches(shuffled[: steps * batch_size], batch_size)):
            factor = _factor(epoch + step / steps, warmup_epochs, epochs)
            truth = masks[some].to(device).long()
            for result, optimizer in zip(results, optimizers):
                if result.diverged:
                    continue
                optimizer.param_groups[0]["lr"] = result.spec.lr * factor
                patches = tokens[result.spec.layer].patches.to(device)
                logits = interpolate(
                    result.head(patches), train.layers[result.spec.layer].grid, (truth.shape[1], truth.shape[2])
                )
                valid = (truth != IGNORE).sum().clamp_min(1)
                loss = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum") / valid
                if not loss.isfinite():
                    result.diverged = epoch + 1
                    continue
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if progress is not None and bar is not None:
                progress.advance(bar)
    for result in results:
        result.head.eval()
    _choose_by(results, train, masks, held_rows, batch_size, device)
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    return results, len(held_rows)


def _optimizer(result: SegmenterResult) -> torch.optim.AdamW:
    """AdamW without weight decay for biases."""
    spec = result.spec
    matrices = [parameter for parameter in result.head.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in result.head.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.lr)


def _factor(done: float, warmup: float, epochs: int) -> float:
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(epochs - warmup, 1e-12)))


@torch.no_grad()
def _choose_by(
    results: Sequence[SegmenterResult],
    train: Features,
    masks: Tensor,
    rows: Tensor,
    batch_size: int,
    device: str | torch.device,
) -> None:
    """Compute the mIoU of heads on the held-out images, at the resolution of training."""
    if not len(rows):
        return
    counts = torch.zeros(len(results), 3, len(train.classes), dtype=torch.int64)
    for some, tokens in train.batches(rows, batch_size):
        truth = masks[some].long()
        for number, result in enumerate(results):
            if not result.diverged:
                layer = result.spec.layer
                logits = interpolate(
                    result.head(tokens[layer].patches.to(device)),
                    train.layers[layer].grid,
                    (truth.shape[1], truth.shape[2]),
                )
                said = logits.argmax(1).cpu().flatten(0, 1)
                counts[number] += count_pixels(said, truth.flatten(0, 1), len(train.classes))
    for result, own in zip(results, counts):
        if not result.diverged:
            result.held_out = float(mean_iou(own))


def score_segmenter(
    results: Sequence[SegmenterResult],
    test: Features,
    read: Callable[[int], Tensor],
    progress: Progress | None = None,
) -> None:
    """Count the pixels of each test image, at the resolution of its mask.

    Args:
        results: Heads to test, in which the counts are stored.
        test: Tokens of the test images.
        read: Returns the mask of a row, uint8 (H, W).
        progress: Display of the progress bar.
    """
    bar = progress.add_task("test", total=len(test)) if progress is not None else None
    pixels: list[list[Tensor]] = [[] for _ in results]
    boundaries: list[list[Tensor]] = [[] for _ in results]
    classes = len(test.classes)
    for some, tokens in test.batches(torch.arange(len(test)), 1):
        truth = read(int(some)).long()
        for number, result in enumerate(results):
            layer = result.spec.layer
            device = result.head.classifier.weight.device
            said = predict_masks(
                result.head, tokens[layer].patches, test.layers[layer].grid, (truth.shape[0], truth.shape[1])
            )
            truth = truth.to(device)
            pixels[number].append(count_pixels(said, truth, classes).cpu())
            boundaries[number].append(count_boundary(said, truth, classes).cpu())
        if progress is not None and bar is not None:
            progress.advance(bar)
    for number, result in enumerate(results):
        result.pixels, result.boundaries = torch.stack(pixels[number]), torch.stack(boundaries[number])
    if progress is not None and bar is not None:
        progress.remove_task(bar)
