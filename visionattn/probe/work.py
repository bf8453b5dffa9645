"""The parts of a run of `visionattn probe`, from the tokens to the ONNX file; each can be stopped and goes on."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Subset

from visionattn.errors import InputError, StorageError
from visionattn.export import export_onnx
from visionattn.files import atomic_path
from visionattn.probe.few_shot import few_shot
from visionattn.probe.heads.banks import Head, HeadSpec, grid, head_tokens
from visionattn.probe.heads.results import SweepResult
from visionattn.probe.inputs import Images, Part
from visionattn.probe.knn import ChannelStatistics, channel_statistics, nearest_neighbours
from visionattn.probe.pixels import PixelBaseline, PixelHead, read_pixels
from visionattn.probe.progress import show_progress
from visionattn.probe.report.maps import attention_of, overlay
from visionattn.probe.report.report import LayerNeighbours, Report, Skipped, head_file
from visionattn.probe.state import RunState
from visionattn.probe.sweep import hold_out, sweep
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures, extract, space_line
from visionattn.probe.tokens.interface import Features
from visionattn.probe.tokens.loading import find_readable
from visionattn.weights.hashing import hash_state

__all__ = ["HOLDOUT", "WARMUP", "ProbedClassifier", "ProbingRun"]

HOLDOUT = 0.1
WARMUP = 0.1  # of the epochs
# A few images make an epoch of one step: a head needs more of these than a data set has epochs.
FEW_SHOT_STEPS = 200
EXTRACTION_BATCH = 64


class ProbedClassifier(nn.Module):
    """A backbone and a head as one model, of one input size.

    Args:
        backbone: On the CPU, computing in float32.
        position: Which of the backbone's layers the head reads.
        head: In evaluation.
        classes: Names.
        mean: Of the images' normalisation.
        std: Likewise.

    Shape:
        (B, C, H, W), normalised -> (B, K), logits.
    """

    def __init__(
        self,
        backbone: Backbone,
        position: int,
        head: Head,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model: Any = backbone.model
        self.head = head
        self.num_classes = len(classes)
        self._read = backbone
        self._position = position
        cfg = dict(getattr(self.model, "pretrained_cfg", None) or {})
        channels = len(mean)
        self.pretrained_cfg = {
            "architecture": f"{cfg.get('architecture') or type(self.model).__name__} probed",
            "input_size": (channels, *backbone.image_size),
            "fixed_input_size": True,
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "label_names": list(classes),
        }

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        tokens = self._read(images)[self._position]
        return self.head(head_tokens(tokens, self.head.pooling.tokens))


class ProbingRun:
    """The parts of a run, each of which goes on where an earlier run of the same settings ended."""

    def __init__(self, args: argparse.Namespace, backbone: Backbone, images: Images, console: Console) -> None:
        self.args, self.backbone, self.images, self.console = args, backbone, images, console
        self.weights = hash_state(backbone.model.state_dict())
        self.skipped: list[Skipped] = []
        self.readable: list[Tensor] = []  # rows of the training and of the test images
        self.batch_size = 0

    def features(self) -> list[Features]:
        """Tokens of the training and the test images."""
        args, parts = self.args, {"train": self.images.train, "test": self.images.test}
        count = sum(len(part.names) for part in parts.values())
        if args.live:
            self.console.print(f"Tokens of {count:,} images are computed at each pass (--live): nothing is stored.")
        else:
            self.console.print(space_line(self.backbone, count, args.precision, args.cache))
        found: list[Features] = []
        for name, part in parts.items():
            features = self._live(part) if args.live else self._stored(name, part)
            skipped = dict(features[1])
            self.skipped += [Skipped(name, part.names[row], reason) for row, reason in skipped.items()]
            self.readable.append(torch.tensor([row for row in range(len(part.names)) if row not in skipped]))
            found.append(features[0])
        return found

    def _live(self, part: Part) -> tuple[Features, list[tuple[int, str]]]:
        with show_progress(self.console) as progress:
            readable = find_readable(part.dataset, self.args.workers, progress)
        dataset = Subset(part.dataset, readable.rows.tolist())
        names = [part.names[row] for row in readable.rows.tolist()]
        features = LiveFeatures(self.backbone, dataset, readable.labels, self.images.classes, self.args.workers, names)
        return features, readable.skipped

    def _stored(self, name: str, part: Part) -> tuple[Features, list[tuple[int, str]]]:
        args = self.args
        identity = {
            "model": args.backbone,
            "transform": self.images.transform,
            "dataset": f"{args.dataset}, {args.root}, {name}, {part.digest}",
        }
        try:
            with warnings.catch_warnings(record=True) as told, show_progress(self.console) as progress:
                warnings.simplefilter("always")
                features = extract(
                    self.backbone,
                    part.dataset,
                    args.cache,
                    identity=identity,
                    classes=self.images.classes,
                    precision=args.precision,
                    batch_size=EXTRACTION_BATCH,
                    num_workers=args.workers,
                    names=part.names,
                    progress=progress,
                )
        except StorageError as error:
            raise StorageError(f"{error} The options are --live and --precision int8.") from error
        ours = [str(warning.message) for warning in told if warning.category is UserWarning]
        for words in dict.fromkeys(ours):  # others are of the reader's files left open, and such
            self._note(words)
        return features, features.skipped

    def plan(self, specs: list[HeadSpec]) -> str:
        """Hash of all that the numbers of the report depend on."""
        args = self.args
        settings = {
            "weights": self.weights,
            "images": [self.images.train.digest, self.images.test.digest, self.images.transform],
            "layers": self.backbone.indices,
            "computed in": str(self.backbone.autocast),
            "tokens": "live" if args.live else args.precision,
            "heads": [asdict(spec) for spec in specs],
            "training": [args.epochs, args.batch_size],
            "few-shot": [args.few_shot, args.draws],
            "left out": [args.no_knn, args.no_pixels],
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def sweep(self, train: Features, test: Features, specs: list[HeadSpec]) -> SweepResult:
        """Train the heads."""
        args = self.args
        fitting = len(hold_out(train.labels, torch.arange(len(train)), HOLDOUT, 0)[0])
        self.batch_size = min(args.batch_size, fitting)
        settings = {
            "weights": self.weights,
            "model": args.backbone,
            "images": [self.images.train.digest, self.images.test.digest, self.images.transform, len(train), len(test)],
            "layers": self.backbone.indices,
            "computed in": str(self.backbone.autocast),
            "tokens": "live" if args.live else args.precision,
            "heads": [asdict(spec) for spec in specs],
            "training": [args.epochs, self.batch_size],
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.state = RunState(args.output / "state" / key, len(test), self._note)
        with show_progress(self.console) as progress:
            return self._train(train, test, specs, progress, self.state.folder / "sweep.pt")

    def _train(
        self, train: Features, test: Features, specs: list[HeadSpec], progress: Progress, state: Path | None = None
    ) -> SweepResult:
        args = self.args
        return sweep(
            train,
            test,
            specs,
            epochs=args.epochs,
            batch_size=self.batch_size,
            warmup_epochs=WARMUP * args.epochs,
            holdout=HOLDOUT,
            device=args.device,
            state=state,
            progress=progress,
        )

    def _note(self, words: str) -> None:
        self.console.print(f"note: {words}")

    def neighbours(self, report: Report, train: Features, test: Features) -> None:
        """k-NN on the class token and on the mean of the patches, at each layer, as they are and standardised."""
        known = self.state.neighbours("neighbours.pt")
        wanted = [
            (position, source, standardized)
            for position, layer in enumerate(report.layers)
            for source in (("class", "mean") if layer.has_class else ("mean",))
            for standardized in (False, True)
        ]
        statistics: dict[tuple[int, str], ChannelStatistics] = {}
        with show_progress(self.console) as progress:
            for position, source, standardized in wanted:
                # Without standardisation the key has two parts.
                key = (position, source, "standardized") if standardized else (position, source)
                if key not in known:
                    start = time.perf_counter()
                    if standardized and not statistics:
                        statistics = channel_statistics(train, progress=progress)
                    known[key] = nearest_neighbours(
                        train,
                        test,
                        position,
                        source,
                        holdout=HOLDOUT,
                        device=self.args.device,
                        standardize=statistics[position, source] if standardized else False,
                        progress=progress,
                    )
                    self.state.keep_neighbours("neighbours.pt", known)
                    self.state.spend("k-NN", time.perf_counter() - start)
                report.neighbours.append(LayerNeighbours(position, source, known[key], standardized))
        report.seconds["k-NN"] = self.state.seconds.get("k-NN", 0.0)

    def pixels(self, report: Report) -> None:
        """The baseline without a network, with the settings of the heads."""
        args = self.args
        name = "pixels.pt" if not args.no_knn else "pixels-linear.pt"
        report.pixels = self.state.pixels(name)
        if report.pixels is None:
            start = time.perf_counter()
            with show_progress(self.console) as progress:
                train, test = (
                    read_pixels(
                        Subset(part.dataset, rows.tolist()),
                        self.images.size,
                        self.images.mean,
                        self.images.std,
                        self.images.classes,
                        args.workers,
                        progress,
                    )
                    for part, rows in zip((self.images.train, self.images.test), self.readable, strict=True)
                )
                report.pixels = PixelBaseline(
                    {}
                    if args.no_knn
                    else {
                        standardize: nearest_neighbours(
                            train, test, 0, "mean", holdout=HOLDOUT, device=args.device, standardize=standardize
                        )
                        for standardize in (False, True)
                    },
                    self._pixel_head(train, test, progress),
                )
            self.state.keep_pixels(name, report.pixels)
            self.state.spend("pixels", time.perf_counter() - start)
        report.seconds["pixels"] = self.state.seconds.get("pixels", 0.0)

    def _pixel_head(self, train: Features, test: Features, progress: Progress) -> PixelHead | None:
        args = self.args
        found = self._train(
            train, test, grid(["gap"], [0], [args.optimizer], args.lrs, args.weight_decays, args.seeds), progress
        )
        if not found.chosen or found.chosen[0].best is None:
            return None
        chosen = found.chosen[0]
        assert chosen.best is not None
        parameters = sum(parameter.numel() for parameter in chosen.head.parameters())
        return PixelHead(chosen.spec, chosen.held_out_accuracy, chosen.best_epoch, parameters, chosen.best)

    def few_shot(self, report: Report, train: Features, test: Features) -> None:
        """The best of each pooling with a few training images."""
        args = self.args
        specs = [result.spec for result in report.best()]
        counts = train.labels.bincount(minlength=len(report.classes))
        present = counts[counts > 0]
        for size in args.few_shot if specs else []:
            if size > int(present.min()):
                rarest = report.classes[int(torch.where(counts > 0, counts, len(train) + 1).argmin())]
                report.notes.append(
                    f"No head was trained on {size} images a class: {rarest} has {int(present.min())} training images."
                )
                continue
            name = f"few-shot-{size}-{args.draws}.pt"
            results = self.state.few_shot(name)
            if results is None:
                start = time.perf_counter()
                images = size * (int(present.sum()) if isinstance(size, float) else len(present))
                steps = max(1, int(images) // self.batch_size)
                epochs = max(args.epochs, math.ceil(FEW_SHOT_STEPS / steps))
                with show_progress(self.console) as progress:
                    results = few_shot(
                        train,
                        test,
                        specs,
                        [size],
                        args.draws,
                        batch_size=self.batch_size,
                        epochs=epochs,
                        warmup_epochs=WARMUP * epochs,
                        holdout=0.0,
                        device=args.device,
                        progress=progress,
                    )
                self.state.keep_few_shot(name, results)
                self.state.spend("few-shot", time.perf_counter() - start)
            report.few_shot += results
        report.seconds["few-shot"] = self.state.seconds.get("few-shot", 0.0)

    def maps(self, report: Report, test: Features) -> None:
        """Attention maps of the reference head on test images of different classes."""
        result = report.reference()
        if result is None or result.best is None or not result.spec.pooling.startswith("ep") or not self.args.maps:
            return
        firsts = [int((test.labels == label).nonzero()[0]) for label in test.labels.unique()]
        rows = firsts[:: max(1, len(firsts) // self.args.maps)][: self.args.maps]
        dataset, places = self.images.test.dataset, self.readable[1]
        images = torch.stack([dataset[int(places[row])][0] for row in rows])
        tokens = self.backbone(images)[result.spec.layer]
        attention = attention_of(result.head, tokens)
        for row, image, shares in zip(rows, images, attention):
            sheet = overlay(_picture(image, self.images), shares, report.layers[result.spec.layer].grid)
            name = self.images.test.names[int(places[row])]
            file = f"maps/{row:06d}.jpg"
            with atomic_path(self.args.output / file) as temporary:
                sheet.save(temporary, quality=90)
            truth, said = (report.classes[int(label)] for label in (test.labels[row], result.best.predictions[row]))
            verdict = "right" if truth == said else f"taken for {said}"
            report.maps.append((file, f"{report.name(result)} on {name}: {truth}, {verdict}"))

    def export(self, report: Report) -> None:
        """Backbone and head as one ONNX file."""
        result = next((result for result in report.best() if result.spec.pooling == self.args.export), None)
        if result is None:
            raise InputError(f"No head of {self.args.export} was chosen, so that none can be exported.")
        model = copy.deepcopy(self.backbone.model).to("cpu", torch.float32)
        index = self.backbone.indices[result.spec.layer]
        backbone = Backbone(model, [index], self.backbone.norm, image_size=self.backbone.image_size)
        probed = ProbedClassifier(
            backbone, 0, result.head.float(), report.classes, self.images.mean, self.images.std
        )  # fmt: skip
        with self.console.status("Exporting; a large network takes minutes."):
            file = export_onnx(
                probed,
                self.args.output / f"{self.args.export}.onnx",
                weights=f"{report.backbone['weights']}; {head_file(Path('heads'), report, result)}",
                license=report.backbone["license"],
            )
        self.console.print(f"Wrote {file.path}: {file.bytes / 1e6:.2f} MB, checked against PyTorch.")


def _picture(image: Tensor, images: Images) -> Image.Image:
    """What the backbone saw."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
