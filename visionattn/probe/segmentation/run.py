"""Run of a segmentation probe, from the masks to the report."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Subset

from visionattn.data.images import eight_bits, open_image
from visionattn.errors import InputError
from visionattn.files import atomic_path
from visionattn.metrics.segmentation import iou, mean_iou, pixel_accuracy
from visionattn.metrics.targets import draws
from visionattn.opening import Opened
from visionattn.probe.heads.banks import HeadSpec, grid
from visionattn.probe.progress import show_progress
from visionattn.probe.reading import TokenReader
from visionattn.probe.report.tasks import Difference, Metric, TaskHead, TaskReport
from visionattn.probe.segmentation.heads import SEGMENTERS, predict_masks
from visionattn.probe.segmentation.images import SegmentationImages
from visionattn.probe.segmentation.overlays import compare_masks
from visionattn.probe.segmentation.pixels import read_pixel_tokens
from visionattn.probe.segmentation.training import (
    DETAIL,
    SegmenterResult,
    score_segmenter,
    train_segmenters,
)
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.statistics import Interval
from visionattn.probe.task_run import HOLDOUT, WARMUP, TaskRun
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Features

__all__ = ["SegmentationRun"]

METRICS = (
    Metric("miou", "mIoU"),
    Metric("pixel_accuracy", "pixel accuracy"),
    Metric("boundary_iou", "boundary mIoU"),
)
WORDS = (
    "The best head of each kind and layer by mIoU on the held-out images. mIoU is the mean of intersection over union "
    "over classes, with pixels of all test images counted together at the resolution of their masks; boundary mIoU is "
    "that of the pixels at most 2 % of the image's diagonal away from a boundary. Brackets are 95 % intervals, "
    "bootstrapped over test images. Pixels are a baseline without a backbone: a linear head on 4 x 4 mean colours of "
    "each patch."
)


class SegmentationRun(TaskRun):
    """A run, part by part."""

    metrics = METRICS
    class_metrics = (Metric("iou", "IoU"), Metric("boundary_iou", "boundary IoU"))
    words = WORDS

    def __init__(
        self,
        settings: ProbeSettings,
        name: str,
        opened: Opened,
        backbone: Backbone,
        images: SegmentationImages,
        console: Console,
    ) -> None:
        super().__init__(settings, name, opened, backbone, images, console)
        heads = list(dict.fromkeys(settings.heads or SEGMENTERS))
        if unknown := [head for head in heads if head not in SEGMENTERS]:
            names = ", ".join(map(repr, SEGMENTERS))
            raise InputError(f"heads of segmentation must be some of {names}; got {unknown[0]!r}.")
        self.specs = self._grid(heads, range(len(backbone.layers)))

    def _grid(self, heads: Sequence[str], layers: Sequence[int]) -> list[HeadSpec]:
        settings = self.settings
        rates = settings.learning_rates
        return grid(heads, layers, ["adamw"], rates, list(settings.weight_decays), list(settings.seeds))

    def report(self, command: str | None = None) -> TaskReport:
        """Do all parts of the work.

        Args:
            command: The call to be reported; None: the command line.
        """
        settings, images, seconds = self.settings, self.images, {}
        plan = self.plan
        height, width = self.backbone.layers[0].grid
        start = time.perf_counter()
        with show_progress(self.console) as progress:
            masks = images.training_masks((DETAIL * height, DETAIL * width), progress)
        tokens = TokenReader(settings, self.name, self.backbone, images, self.console)
        train, test = tokens.read()
        readable_train, self.rows = tokens.readable
        seconds["tokens"] = time.perf_counter() - start
        start = time.perf_counter()
        results, held = self._train(train, test, masks[readable_train], self.specs)
        seconds["heads"] = time.perf_counter() - start
        heads = [(result, result.spec.pooling, self.backbone.indices[result.spec.layer]) for result in results]
        entries: list[tuple[SegmenterResult, str, int | None]] = [*heads]
        if not settings.no_pixels:
            start = time.perf_counter()
            entries += [(result, "pixels", None) for result in self._pixels(masks[readable_train], tokens)]
            seconds["pixels"] = time.perf_counter() - start
        report = self._describe(
            command,
            [train, test],
            held,
            [_head(*entry) for entry in entries],
            "adamw",
            seconds=seconds,
            notes=self._notes(results),
            skipped=tokens.skipped,
            plan=plan,
        )
        report.protocol["loss at"] = f"{DETAIL} x {DETAIL} positions per token"
        scored = [(result, head) for (result, _, _), head in zip(entries, report.heads) if head.chosen]
        self.saved = [(head, result.head, settings.epochs) for result, head in scored if head.layer_index is not None]
        if scored:
            counts = scored[0][0].pixels[:, 2].sum(0)
            report.counts["test pixels"] = counts.tolist()
        best = report.best()
        if best is not None:
            chosen = next(result for result, head in scored if head is best)
            report.differences = [
                Difference(report.name(head), *_difference(chosen.pixels, result.pixels))
                for result, head in scored
                if head is not best
            ]
            report.examples = self._examples(chosen, test, report.name(best))
        return report

    def _train(
        self, train: Features, test: Features, masks: Tensor, specs: Sequence[HeadSpec]
    ) -> tuple[list[SegmenterResult], int]:
        """Train, select and test heads."""
        settings = self.settings
        with show_progress(self.console) as progress:
            results, held = train_segmenters(
                train,
                masks,
                specs,
                epochs=settings.epochs,
                batch_size=settings.images_a_step,
                warmup_epochs=WARMUP * settings.epochs,
                holdout=HOLDOUT,
                device=settings.device,
                progress=progress,
            )
            chosen: dict[tuple[str, int], SegmenterResult] = {}
            for result in results:
                key = result.spec.pooling, result.spec.layer
                if not result.diverged and (key not in chosen or result.held_out > chosen[key].held_out):
                    chosen[key] = result
            read = [int(row) for row in self.rows]
            score_segmenter(
                list(chosen.values()), test, lambda row: torch.from_numpy(self.images.mask(1, read[row])), progress
            )
        return results, held

    def _pixels(self, masks: Tensor, tokens: TokenReader) -> list[SegmenterResult]:
        """The baseline without a network."""
        images = self.images
        with show_progress(self.console) as progress:
            train, test = (
                read_pixel_tokens(
                    Subset(part.dataset, rows.tolist()),
                    self.backbone.image_size,
                    self.backbone.layers[0].grid,
                    images.classes,
                    self.settings.workers,
                    progress,
                )
                for part, rows in zip((images.train, images.test), tokens.readable, strict=True)
            )
        return self._train(train, test, masks, self._grid(["linear"], [0]))[0]

    def _notes(self, results: Sequence[SegmenterResult]) -> list[str]:
        diverged = [result for result in results if result.diverged]
        notes = [
            f"{result.spec.pooling} at {result.layer} with the learning rate {result.spec.lr:g} diverged."
            for result in diverged
        ]
        return [*self.images.left_out, *notes]

    def _examples(self, result: SegmenterResult, test: Features, name: str) -> list[tuple[str, str]]:
        """Predictions of the best head for images spread over the test split."""
        wanted = min(self.settings.maps, len(test))
        found = []
        for row in [round((number + 0.5) * len(test) / wanted - 0.5) for number in range(wanted)]:
            place = int(self.rows[row])
            truth = self.images.mask(1, place)
            tokens = next(test.batches(torch.tensor([row]), 1))[1][result.spec.layer].patches
            with torch.no_grad():
                said = predict_masks(
                    result.head, tokens, test.layers[result.spec.layer].grid, (truth.shape[0], truth.shape[1])
                )
            path = self.images.pairs[1][place].image
            sheet = compare_masks(eight_bits(open_image(path), path), truth, said.cpu().numpy(), self.images.classes)
            file = f"examples/{place:06d}.jpg"
            with atomic_path(self.folder / file) as temporary:
                sheet.save(temporary, quality=90)
            value = float(mean_iou(result.pixels[row]))
            found.append(
                (file, f"{self.images.test.names[place]}: image, ground truth, {name} (mIoU {100 * value:.1f} %)")
            )
        return found


def _head(result: SegmenterResult, name: str, index: int | None) -> TaskHead:
    head = TaskHead(
        name=name,
        spec=result.spec,
        layer=result.layer if index is not None else "–",
        layer_index=index,
        parameters=sum(parameter.numel() for parameter in result.head.parameters()),
        held_out=result.held_out,
    )
    if len(result.pixels):
        pixels, boundaries = result.pixels, result.boundaries
        head.scores = {
            "miou": (float(mean_iou(pixels.sum(0))), _interval(mean_iou(_resampled(pixels)))),
            "pixel_accuracy": (float(pixel_accuracy(pixels.sum(0))), _interval(pixel_accuracy(_resampled(pixels)))),
            "boundary_iou": (float(mean_iou(boundaries.sum(0))), _interval(mean_iou(_resampled(boundaries)))),
        }
        head.classes = {"iou": iou(pixels.sum(0)).tolist(), "boundary_iou": iou(boundaries.sum(0)).tolist()}
    return head


def _resampled(counts: Tensor) -> Tensor:
    """Sums of counts (n, 3, K) over draws of images: (R, 3, K)."""
    return torch.einsum("rn,nck->rck", torch.from_numpy(draws(len(counts))), counts.double())


def _interval(values: Tensor) -> Interval:
    low, high = np.nanquantile(values.numpy(), [0.025, 0.975])
    return Interval(float(low), float(high))


def _difference(counts: Tensor, others: Tensor) -> tuple[float, Interval]:
    value = float(mean_iou(counts.sum(0)) - mean_iou(others.sum(0)))
    return value, _interval(mean_iou(_resampled(counts)) - mean_iou(_resampled(others)))
