"""Run of `visionattn probe`, from the tokens to the ONNX file; each part can be interrupted and resumed."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Subset

from visionattn.errors import InputError
from visionattn.export import export_onnx
from visionattn.files import atomic_path
from visionattn.opening import Opened
from visionattn.probe.few_shot import few_shot
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.heads.results import SweepResult
from visionattn.probe.inputs import Images
from visionattn.probe.knn import ChannelStatistics, channel_statistics, nearest_neighbours
from visionattn.probe.pixels import PixelBaseline, PixelHead, read_pixels
from visionattn.probe.probed import ProbedModel
from visionattn.probe.processes import rank_and_size
from visionattn.probe.progress import show_progress
from visionattn.probe.reading import TokenReader
from visionattn.probe.report.facts import backbone_facts, data_facts, opening_facts, versions
from visionattn.probe.report.head_files import head_file
from visionattn.probe.report.maps import attention_of, overlay
from visionattn.probe.report.rendering import write_report
from visionattn.probe.report.report import LayerNeighbours, Report
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.state import RunState
from visionattn.probe.sweep import hold_out, sweep
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Features
from visionattn.weights.hashing import hash_state

__all__ = ["HOLDOUT", "WARMUP", "ProbingRun"]

HOLDOUT = 0.1
WARMUP = 0.1  # of the epochs
# With a few images, an epoch is a single step, so that few-shot heads need more epochs.
FEW_SHOT_STEPS = 200


class ProbingRun:
    """A run, part by part; each part resumes from an earlier run with the same settings."""

    def __init__(
        self,
        settings: ProbeSettings,
        name: str,
        opened: Opened,
        backbone: Backbone,
        images: Images,
        console: Console,
    ) -> None:
        self.settings, self.name, self.opened = settings, name, opened
        self.backbone, self.images, self.console = backbone, images, console
        self.weights = hash_state(backbone.model.state_dict())
        self.specs, self.notes = settings.specs(backbone.layers, len(images.classes))
        self.batch_size = 0

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.settings.output or "")

    def report(self, command: str | None = None) -> Report:
        """Do all parts of the work except the export.

        Args:
            command: The call to be reported; None: the command line.
        """
        settings, images = self.settings, self.images
        start = time.perf_counter()
        self.tokens = TokenReader(settings, self.name, self.backbone, images, self.console)
        train, test = self.tokens.read()
        extracting = time.perf_counter() - start
        found = self.sweep(train, test)
        if "tokens" not in self.state.seconds:  # later runs only check that the tokens exist
            self.state.spend("tokens", extracting)
        report = Report(
            command=command or settings.command(self.name, images.data),
            backbone={
                **backbone_facts(self.name, self.opened, self.backbone, self.weights),
                **opening_facts(settings),
            },
            data=data_facts(images, len(train), len(test)),
            protocol={
                "optimizer": settings.optimizer,
                "epochs": settings.epochs,
                "warm-up epochs": WARMUP * settings.epochs,
                "batch": self.batch_size,
                "held-out share": HOLDOUT,
                "tokens in": "float32, not stored" if settings.live else settings.precision,
            },
            versions=versions(),
            layers=self.backbone.layers,
            indices=self.backbone.indices,
            classes=images.classes,
            held_out=len(hold_out(train.labels, torch.arange(len(train)), HOLDOUT, 0)[1]),
            sweep=found,
            seconds={"tokens": self.state.seconds["tokens"], "heads": found.seconds},
            notes=[*self.notes, *images.left_out, *found.notes],
            skipped=self.tokens.skipped,
            plan=self.plan,
            test_names=[images.test.names[row] for row in self.tokens.readable[1].tolist()],
            test_labels=test.labels,
        )
        self._note_ends(report)
        if not settings.no_knn:
            self.neighbours(report, train, test)
        if not settings.no_pixels:
            self.pixels(report)
        if settings.few_shot:
            self.few_shot(report, train, test)
        if rank_and_size()[0] == 0:
            self.maps(report, test)
        return report

    def _note_ends(self, report: Report) -> None:
        """Add a note if a selected learning rate is the lowest or the highest of several."""
        rates = self.settings.learning_rates
        at_end = [result for result in report.best() if result.spec.lr in (min(rates), max(rates))]
        if at_end and len(rates) > 1:
            names = ", ".join(f"{report.name(result)} ({result.spec.lr:g})" for result in at_end)
            report.notes.append(f"The selected learning rate is at an end of the range for {names}: extend --lrs.")

    @property
    def plan(self) -> str:
        """Hash of all that the numbers of the report depend on."""
        settings = self.settings
        content = {
            "weights": self.weights,
            "images": [self.images.train.digest, self.images.test.digest, self.images.transform],
            "layers": self.backbone.indices,
            "computed in": str(self.backbone.autocast),
            "tokens": "live" if settings.live else settings.precision,
            "heads": [asdict(spec) for spec in self.specs],
            "training": [settings.epochs, settings.images_a_step],
            "few-shot": [settings.few_shot, settings.draws],
            "left out": [settings.no_knn, settings.no_pixels],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def sweep(self, train: Features, test: Features) -> SweepResult:
        """Train the heads."""
        settings = self.settings
        fitting = len(hold_out(train.labels, torch.arange(len(train)), HOLDOUT, 0)[0])
        self.batch_size = min(settings.images_a_step, fitting)
        content = {
            "weights": self.weights,
            "model": self.name,
            "images": [self.images.train.digest, self.images.test.digest, self.images.transform, len(train), len(test)],
            "layers": self.backbone.indices,
            "computed in": str(self.backbone.autocast),
            "tokens": "live" if settings.live else settings.precision,
            "heads": [asdict(spec) for spec in self.specs],
            "training": [settings.epochs, self.batch_size],
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        self.state = RunState(self.folder / "state" / key, len(test), self._note)
        with show_progress(self.console) as progress:
            return self._train(train, test, self.specs, progress, self.state.folder / "sweep.pt")

    def _train(
        self, train: Features, test: Features, specs: list[HeadSpec], progress: Progress, state: Path | None = None
    ) -> SweepResult:
        settings = self.settings
        return sweep(
            train,
            test,
            specs,
            epochs=settings.epochs,
            batch_size=self.batch_size,
            warmup_epochs=WARMUP * settings.epochs,
            holdout=HOLDOUT,
            device=settings.device,
            state=state,
            progress=progress,
        )

    def _note(self, words: str) -> None:
        self.console.print(f"note: {words}")

    def neighbours(self, report: Report, train: Features, test: Features) -> None:
        """k-NN on the class token and on the mean of the patches, at each layer, raw and standardised."""
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
                # Without standardisation the key has two entries.
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
                        device=self.settings.device,
                        standardize=statistics[position, source] if standardized else False,
                        progress=progress,
                    )
                    self.state.keep_neighbours("neighbours.pt", known)
                    self.state.spend("k-NN", time.perf_counter() - start)
                report.neighbours.append(LayerNeighbours(position, source, known[key], standardized))
        report.seconds["k-NN"] = self.state.seconds.get("k-NN", 0.0)

    def pixels(self, report: Report) -> None:
        """The baseline without a network, with the settings of the heads."""
        settings = self.settings
        name = "pixels.pt" if not settings.no_knn else "pixels-linear.pt"
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
                        settings.workers,
                        progress,
                    )
                    for part, rows in zip((self.images.train, self.images.test), self.tokens.readable, strict=True)
                )
                report.pixels = PixelBaseline(
                    {}
                    if settings.no_knn
                    else {
                        standardize: nearest_neighbours(
                            train, test, 0, "mean", holdout=HOLDOUT, device=settings.device, standardize=standardize
                        )
                        for standardize in (False, True)
                    },
                    self._pixel_head(train, test, progress),
                )
            self.state.keep_pixels(name, report.pixels)
            self.state.spend("pixels", time.perf_counter() - start)
        report.seconds["pixels"] = self.state.seconds.get("pixels", 0.0)

    def _pixel_head(self, train: Features, test: Features, progress: Progress) -> PixelHead | None:
        settings = self.settings
        found = self._train(train, test, settings.grid("gap", [0]), progress)
        if not found.chosen or found.chosen[0].best is None:
            return None
        chosen = found.chosen[0]
        assert chosen.best is not None
        parameters = sum(parameter.numel() for parameter in chosen.head.parameters())
        return PixelHead(chosen.spec, chosen.held_out_accuracy, chosen.best_epoch, parameters, chosen.best)

    def few_shot(self, report: Report, train: Features, test: Features) -> None:
        """Train the best head of each pooling with a few training images."""
        settings = self.settings
        specs = [result.spec for result in report.best()]
        counts = train.labels.bincount(minlength=len(report.classes))
        present = counts[counts > 0]
        for size in settings.few_shot if specs else []:
            if size > int(present.min()):
                rarest = report.classes[int(torch.where(counts > 0, counts, len(train) + 1).argmin())]
                report.notes.append(
                    f"No head was trained with {size} images per class: {rarest} has {int(present.min())} for training."
                )
                continue
            name = f"few-shot-{size}-{settings.draws}.pt"
            results = self.state.few_shot(name)
            if results is None:
                start = time.perf_counter()
                images = size * (int(present.sum()) if isinstance(size, float) else len(present))
                steps = max(1, int(images) // self.batch_size)
                epochs = max(settings.epochs, math.ceil(FEW_SHOT_STEPS / steps))
                with show_progress(self.console) as progress:
                    results = few_shot(
                        train,
                        test,
                        specs,
                        [size],
                        settings.draws,
                        batch_size=self.batch_size,
                        epochs=epochs,
                        warmup_epochs=WARMUP * epochs,
                        holdout=0.0,
                        device=settings.device,
                        progress=progress,
                    )
                self.state.keep_few_shot(name, results)
                self.state.spend("few-shot", time.perf_counter() - start)
            report.few_shot += results
        report.seconds["few-shot"] = self.state.seconds.get("few-shot", 0.0)

    def maps(self, report: Report, test: Features) -> None:
        """Attention maps of the reference head on test images of different classes."""
        result = report.reference()
        if result is None or result.best is None or not result.spec.pooling.startswith("ep") or not self.settings.maps:
            return
        firsts = [int((test.labels == label).nonzero()[0]) for label in test.labels.unique()]
        rows = firsts[:: max(1, len(firsts) // self.settings.maps)][: self.settings.maps]
        dataset, places = self.images.test.dataset, self.tokens.readable[1]
        images = torch.stack([dataset[int(places[row])][0] for row in rows])
        tokens = self.backbone(images)[result.spec.layer]
        attention = attention_of(result.head, tokens)
        for row, image, shares in zip(rows, images, attention):
            sheet = overlay(_picture(image, self.images), shares, report.layers[result.spec.layer].grid)
            name = self.images.test.names[int(places[row])]
            file = f"maps/{row:06d}.jpg"
            with atomic_path(self.folder / file) as temporary:
                sheet.save(temporary, quality=90)
            truth, said = (report.classes[int(label)] for label in (test.labels[row], result.best.predictions[row]))
            verdict = "correct" if truth == said else f"predicted {said}"
            report.maps.append((file, f"{report.name(result)} on {name}: {truth}, {verdict}"))

    def write(self, report: Report) -> None:
        """Write the report to the folder of the run, and the ONNX file."""
        write_report(report, self.folder)
        report.folder = self.folder
        if self.settings.export:
            self.export(report)

    def export(self, report: Report) -> None:
        """Backbone and head as one ONNX file."""
        result = next((result for result in report.best() if result.spec.pooling == self.settings.export), None)
        if result is None:
            raise InputError(f"No head of {self.settings.export} was selected, so that none can be exported.")
        model = copy.deepcopy(self.backbone.model).to("cpu", torch.float32)
        index = self.backbone.indices[result.spec.layer]
        backbone = Backbone(model, [index], self.backbone.norm, image_size=self.backbone.image_size)
        probed = ProbedModel(backbone, result.head.float(), report.classes, self.images.mean, self.images.std)
        with self.console.status("Exporting; this takes minutes for a large network."):
            file = export_onnx(
                probed,
                self.folder / f"{self.settings.export}.onnx",
                weights=f"{report.backbone['weights']}; {head_file(Path('heads'), report, result)}",
                license=report.backbone["license"],
            )
        self.console.print(f"Wrote {file.path}: {file.bytes / 1e6:.2f} MB, checked against PyTorch.")


def _picture(image: Tensor, images: Images) -> Image.Image:
    """The image as the backbone saw it."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
