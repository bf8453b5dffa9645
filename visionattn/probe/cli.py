"""`visionattn probe BACKBONE --dataset NAME --root FOLDER`: a frozen backbone, judged from one pass over the images."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

import visionattn
from visionattn.checkpoints import create, load
from visionattn.data.samplers import StreamLoader
from visionattn.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    StorageError,
    UnknownNameError,
    VisionAttnError,
)
from visionattn.export import export_onnx
from visionattn.files import atomic_path
from visionattn.probe.backbone import Backbone, hash_weights
from visionattn.probe.banks import Head, HeadSpec, create_head, head_tokens
from visionattn.probe.features import PRECISIONS, LiveFeatures, extract, find_readable, space_line
from visionattn.probe.knn import Neighbours, NeighboursResult, nearest_neighbours
from visionattn.probe.maps import attention_of, overlay
from visionattn.probe.report import LayerNeighbours, Report, Skipped, head_file, percent, write_report
from visionattn.probe.sweep import FewShotResult, HeadResult, few_shot, grid, hold_out, sweep
from visionattn.probe.tokens import Features
from visionattn.weights import mismatches, read, unwrap

__all__ = ["ProbedClassifier", "add_arguments", "run"]

HEADS = ("cls", "gap", "ep_8", "ep_16", "ep_32")
# Of AdamW, whose steps have one size whatever the scale is; of LARS, the paper's range.
LRS = {"adamw": (0.001, 0.003, 0.01, 0.03, 0.1), "lars": (0.1, 0.3, 1.0)}
HOLDOUT = 0.1
WARMUP = 0.1  # of the epochs
# A few images make an epoch of one step: a head needs more of these than a data set has epochs.
FEW_SHOT_STEPS = 200
EXTRACTION_BATCH = 64


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of comma lists."""

    def parse(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def _size(text: str) -> float:
    return float(text) if "." in text else int(text)


def _layers(text: str) -> str | list[int]:
    return text if text in ("last", "all") else _numbers(int)(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("backbone", metavar="NAME|CKPT", help="name in timm's registry, or a weight file or folder")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for NAME; a classifier in it is not needed")
    parser.add_argument("--random", action="store_true", help="untrained weights for NAME")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="digits, mnist, cifar10-sheets, folder, torch/..., hfds/...")
    data.add_argument("--root", metavar="FOLDER", help="where the files are")
    data.add_argument("--train-split", default="train", metavar="NAME", help="of readers with named parts")
    data.add_argument("--val-split", default="validation", metavar="NAME", help="likewise; tests without a test part")
    data.add_argument("--test-split", metavar="NAME", help="likewise")
    data.add_argument("--num-classes", type=int, metavar="N", help="where the data do not say it")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="loading processes (default: 0)")
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--layers", type=_layers, default="last", help="last, all, or indices such as 3,7,11")
    tokens.add_argument("--precision", choices=tuple(PRECISIONS), default="fp16", help="on disk (default: fp16)")
    tokens.add_argument("--cache", type=Path, metavar="FOLDER", help="for tokens (default: features in the output)")
    tokens.add_argument("--live", action="store_true", help="store no tokens: run the backbone at each pass")
    heads = parser.add_argument_group("heads")
    heads.add_argument("--heads", type=_numbers(str), metavar="LIST", help=f"poolings (default: {','.join(HEADS)})")
    heads.add_argument("--optimizer", choices=tuple(LRS), default="adamw", help="adamw, or the paper's lars")
    heads.add_argument("--lrs", type=_numbers(float), metavar="LIST", help="learning rates; lars: times batch / 256")
    heads.add_argument("--weight-decays", type=_numbers(float), default=[0.0], metavar="LIST", help="default: 0")
    heads.add_argument("--seeds", type=_numbers(int), default=[0], metavar="LIST", help="of starting weights")
    heads.add_argument("--epochs", type=int, default=30, help="default: 30; the paper's: 90")
    heads.add_argument("--batch-size", type=int, default=256, help="images a step (default: 256; the paper's: 4096)")
    heads.add_argument("--no-knn", action="store_true", help="leave out nearest neighbours")
    heads.add_argument(
        "--few-shot", type=_numbers(_size), default=[1, 5, 10], metavar="LIST",
        help="images a class, or fractions such as 0.01 (default: 1,5,10; '' for none)",
    )  # fmt: skip
    heads.add_argument("--draws", type=int, default=5, metavar="N", help="of the few images (default: 5)")
    heads.add_argument("--device", help="such as cuda or cpu (default: a GPU where there is one)")
    output = parser.add_argument_group("results")
    output.add_argument("--output", type=Path, metavar="FOLDER", help="default: runs/probe/BACKBONE-DATASET")
    output.add_argument("--maps", type=int, default=4, metavar="N", help="test images with attention maps (default: 4)")
    output.add_argument("--export", metavar="POOLING", help="write backbone and this pooling's best head as ONNX")


class _Part(NamedTuple):
    """Images that train, or test."""

    dataset: Any  # of (tensor, label)
    names: list[str]
    digest: str  # of what they are


@dataclass
class _Images:
    """The data set as the backbone shall see it."""

    train: _Part
    test: _Part
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def transform(self) -> str:
        """In words."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"resized and cropped to {self.size} x {self.size} pixels, mean {mean}, deviation {std}"


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


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 where some images could not be read: they were left out and are listed.

    Raises:
        VisionAttnError: Nothing could be reported.
    """
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    _complete(args)
    model, weights, licence = _model(args)
    images = _images(args, resolve_model_data_config(model))
    backbone = _backbone(args, model, images.size)
    notes: list[str] = []
    specs = _specs(args, backbone, len(images.classes), notes)
    work = _Work(args, backbone, images, console)
    start = time.perf_counter()
    train, test = work.features()
    extracting = time.perf_counter() - start
    found = work.sweep(train, test, specs)
    if "tokens" not in work.seconds:  # later runs only look whether they are there
        work.spend("tokens", extracting)
    held_out = len(hold_out(train.labels, torch.arange(len(train)), HOLDOUT, 0)[1])
    report = Report(
        command=_command_line(args),
        backbone={
            "name": args.backbone,
            "weights": weights,
            "license": licence or "not stated",
            "sha256": work.weights,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        data={
            "dataset": args.dataset,
            "root": args.root,
            "train_images": len(train),
            "test_images": len(test),
            "train_digest": images.train.digest,
            "test_digest": images.test.digest,
            "transform": images.transform,
        },
        protocol={
            "optimizer": args.optimizer,
            "epochs": args.epochs,
            "warm-up epochs": WARMUP * args.epochs,
            "batch": work.batch_size,
            "held-out share": HOLDOUT,
            "tokens in": "float32, not stored" if args.live else args.precision,
        },
        versions={"visionattn": visionattn.__version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "timm", "numpy")},
        layers=backbone.layers,
        indices=backbone.indices,
        classes=images.classes,
        held_out=held_out,
        sweep=found,
        seconds={"tokens": work.seconds["tokens"], "heads": found.seconds},
        notes=[*notes, *found.notes],
        skipped=work.skipped,
    )
    at_end = [result for result in report.best() if result.spec.lr in (min(args.lrs), max(args.lrs))]
    if at_end and len(args.lrs) > 1:
        names = ", ".join(f"{report.name(result)} ({result.spec.lr:g})" for result in at_end)
        report.notes.append(f"The chosen learning rate is an end of those tried for {names}: --lrs can take more.")
    if not args.no_knn:
        work.neighbours(report, train, test)
    if args.few_shot:
        work.few_shot(report, train, test)
    work.maps(report, test)
    write_report(report, args.output)
    if args.export:
        work.export(report)
    _print(report, console)
    console.print(f"The report is {args.output / 'report.html'}; numbers and heads lie beside it.")
    for entry in work.skipped:
        print(f"visionattn: left out of {entry.part}: {entry.name}: {entry.reason}", file=sys.stderr)
    return int(bool(work.skipped))


def _complete(args: argparse.Namespace) -> None:
    """Check what needs no model, and fill in defaults that depend on other options."""
    if args.output is None:
        stem = Path(args.backbone).stem if Path(args.backbone).exists() else args.backbone
        args.output = Path("runs/probe") / re.sub(r"[^\w.-]+", "-", f"{stem}-{args.dataset}")
    args.cache = args.cache or args.output / "features"
    args.lrs = args.lrs or list(LRS[args.optimizer])
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if min(args.epochs, args.draws, args.batch_size) < 1 or args.maps < 0 or not (args.weight_decays and args.seeds):
        raise InputError("Epochs, draws, batch size, weight decays and seeds are needed, and maps are 0 or more.")
    if args.export and args.heads and args.export not in args.heads:
        raise InputError(f"--export {args.export} is none of the heads {', '.join(args.heads)}.")


def _command_line(args: argparse.Namespace) -> str:
    """Every option as it was used, so that other defaults of a later version change nothing."""
    words = ["visionattn", "probe", args.backbone]
    for key, value in vars(args).items():
        if key in ("command", "backbone") or value is None or value is False:
            continue
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            # Joined by "=", a value may begin with a minus.
            words[-1] += "=" + (",".join(map(str, value)) if isinstance(value, list) else str(value))
    return shlex.join(words)


# --- backbone and images ----------------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> tuple[nn.Module, str, str | None]:
    """The backbone with its weights, where they come from, and their licence."""
    name = args.backbone
    if Path(name).exists():
        if args.random or args.checkpoint:
            raise InputError(f"{name} is a file with weights: leave out --random and --checkpoint.")
        return load(name), f"file {Path(name).name}", None
    hosted = name.startswith(("hf-hub:", "local-dir:"))  # names of weights rather than of architectures
    try:
        cfg: Any = None if hosted else get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownNameError(f"{error} Leave out the part after the dot for the default weights.") from error
    settings = {"img_size": args.image_size} if args.image_size and cfg and cfg.fixed_input_size else {}
    if args.checkpoint:
        if args.random:
            raise InputError("Weights are random or those of a file: leave out --random or --checkpoint.")
        return _from_checkpoint(args.checkpoint, name, settings), f"file {Path(args.checkpoint).name}", None
    if args.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the tokens' cache knows weights by their values
            return create(name, **settings), "random", None
    if cfg and not cfg.has_weights:
        raise CheckpointError(
            f"No weights of {name} are published: give a file by --checkpoint, or --random for untrained ones."
        )
    source = (cfg.hf_hub_id or cfg.url or Path(str(cfg.file)).name) if cfg else "as named"
    try:
        return create(name, pretrained=True, **settings), f"{name}, {source}", cfg.license if cfg else None
    except VisionAttnError:
        raise
    # Fetching weights fails in as many ways as there are servers.
    except Exception as error:
        raise CheckpointError(
            f"The weights of {name} ({source}) could not be read: {error} If this machine is offline, give them "
            "by --checkpoint FILE, or --random for untrained ones."
        ) from error


def _from_checkpoint(file: str, name: str, settings: dict[str, Any]) -> nn.Module:
    """Weights of a file without its classifier, of which there may be none or one of other classes."""
    model: Any = create(name, num_classes=0, **settings)
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in unwrap(read(file)).items() if not key.startswith(heads)}
    wanted = model.state_dict()
    # Evaluation does not count batches, and converted files often leave the counters out.
    state |= {key: wanted[key] for key in wanted.keys() - state.keys() if key.endswith(".num_batches_tracked")}
    if wrong := mismatches(state, wanted):
        raise CheckpointError(f"{file} does not fit {name}: {'; '.join(wrong[:3])}{' ...' if wrong[3:] else ''}.")
    model.load_state_dict(state)
    return model


def _backbone(args: argparse.Namespace, model: nn.Module, size: int) -> Backbone:
    try:
        model = model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    on_gpu = torch.device(args.device).type == "cuda"
    options: dict[str, Any] = {"image_size": size, "autocast": torch.bfloat16 if on_gpu else None}
    if args.layers == "last":
        return Backbone(model, None, **options)
    if args.layers == "all":
        return Backbone(model, range(Backbone(model, None, **options).indices[0] + 1), **options)
    return Backbone(model, args.layers, **options)


def _images(args: argparse.Namespace, config: dict[str, Any]) -> _Images:
    """Images that train and test, each as the backbone takes it."""
    from visionattn.data.classify import ClassifyData  # needs Lightning

    size = args.image_size or config["input_size"][1]
    mean, std = config["mean"], config["std"]
    try:
        data = ClassifyData(
            dataset=args.dataset,
            root=args.root,
            num_classes=args.num_classes,
            image_size=size,
            in_chans=config["input_size"][0],
            mean=list(mean),
            std=list(std),
            batch_size=1,  # no image is dropped with an incomplete batch
            train_split=args.train_split,
            val_split=args.val_split,
            test_split=args.test_split,
        )
        data.setup("fit")
        classes = data.class_names or [str(number) for number in range(data.num_classes)]
        if len(classes) != data.num_classes or data.num_classes < 2:
            raise DataError(f"{args.dataset} has {len(classes)} classes, and probing tells two or more apart.")
        loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    except ConfigError as error:
        text = re.sub(r"data\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), str(error))
        raise ConfigError(text) from error
    if any(isinstance(loader, StreamLoader) for loader in loaders):
        raise DataError(
            f"{args.dataset} is a stream, and probing reads images in any order: take a folder, or a reader such as "
            "torch/ or hfds/."
        )
    datasets: list[Any] = [loader.dataset for loader in loaders]
    train, val, test = (_part(dataset) for dataset in datasets)
    # A validation part that does not test is more training images; some of all of them are held out to choose.
    if val.digest != test.digest:
        digest = hashlib.sha256((train.digest + val.digest).encode()).hexdigest()
        train = _Part(ConcatDataset([train.dataset, val.dataset]), train.names + val.names, digest)
    return _Images(train, test, tuple(classes), size, mean, std)


def _part(dataset: Any) -> _Part:
    source = dataset.dataset
    whole: Any = source.dataset if isinstance(source, Subset) else source
    rows = source.indices if isinstance(source, Subset) else range(len(source))
    names = [whole.name(row) for row in rows]
    digest = hashlib.sha256(repr(names).encode())
    if hasattr(whole, "images"):
        digest.update(whole.images.tobytes())
    elif hasattr(whole, "reader") and hasattr(whole.reader, "samples"):
        # Pictures that were replaced are others, also under their old names.
        for row in rows:
            file = Path(whole.reader.filename(row, absolute=True))
            if file.is_file():
                digest.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return _Part(dataset, names, digest.hexdigest())


def _specs(args: argparse.Namespace, backbone: Backbone, classes: int, notes: list[str]) -> list[HeadSpec]:
    """The heads to train: each pooling at each layer where it can be."""
    poolings = list(dict.fromkeys(args.heads or HEADS))
    specs = []
    for pooling in poolings:
        fitting, refused = [], None
        for position, layer in enumerate(backbone.layers):
            try:
                create_head(HeadSpec(pooling), layer, classes)
                fitting.append(position)
            except InputError as error:
                refused = error
        if refused is not None:
            if args.heads and not fitting:
                raise refused
            # Without a class token there is no such head to be expected.
            if pooling != "cls" or args.heads:
                names = [layer.name for place, layer in enumerate(backbone.layers) if place not in fitting]
                notes.append(f"{pooling} was left out at {', '.join(names)}: {refused}")
        specs += grid([pooling], fitting, [args.optimizer], args.lrs, args.weight_decays, args.seeds)
    if args.export and args.export not in {spec.pooling for spec in specs}:
        raise InputError(f"--export {args.export} is none of the heads {', '.join(poolings)} of this backbone.")
    return specs


# --- the work ---------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Bars that disappear when they are done, and none in a pipe."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


class _Work:
    """The parts of a run, each of which goes on where an earlier run of the same settings ended."""

    def __init__(self, args: argparse.Namespace, backbone: Backbone, images: _Images, console: Console) -> None:
        self.args, self.backbone, self.images, self.console = args, backbone, images, console
        self.weights = hash_weights(backbone.model)
        self.skipped: list[Skipped] = []
        self.readable: list[Tensor] = []  # rows of the training and of the test images
        self.batch_size = 0
        self.seconds: dict[str, float] = {}  # of each part, in all runs

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

    def _live(self, part: _Part) -> tuple[Features, list[tuple[int, str]]]:
        with self.console.status("Looking for images that cannot be read."):
            readable = find_readable(part.dataset, self.args.workers)
        dataset = Subset(part.dataset, readable.rows.tolist())
        features = LiveFeatures(self.backbone, dataset, readable.labels, self.images.classes, self.args.workers)
        return features, readable.skipped

    def _stored(self, name: str, part: _Part) -> tuple[Features, list[tuple[int, str]]]:
        args = self.args
        identity = {
            "model": args.backbone,
            "transform": self.images.transform,
            "dataset": f"{args.dataset}, {args.root}, {name}, {part.digest}",
        }
        try:
            with warnings.catch_warnings(record=True) as told, _progress(self.console) as progress:
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
                    progress=progress,
                )
        except StorageError as error:
            raise StorageError(f"{error} The options are --live and --precision int8.") from error
        for words in dict.fromkeys(str(warning.message) for warning in told):
            self.console.print(f"note: {words}")
        return features, features.skipped

    def sweep(self, train: Features, test: Features, specs: list[HeadSpec]) -> Any:
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
        self.state = args.output / "state" / key
        file = self.state / "seconds.json"
        if file.exists():
            self.seconds = json.loads(file.read_text())
        with _progress(self.console) as progress:
            return sweep(
                train,
                test,
                specs,
                epochs=args.epochs,
                batch_size=self.batch_size,
                warmup_epochs=WARMUP * args.epochs,
                holdout=HOLDOUT,
                device=args.device,
                state=self.state / "sweep.pt",
                progress=progress,
            )

    def neighbours(self, report: Report, train: Features, test: Features) -> None:
        """k-NN on the class token and on the mean of the patches, at each layer."""
        file = self.state / "neighbours.pt"
        known: dict[tuple[int, str], list[dict[str, Any]]] = {}
        if file.exists():
            known = torch.load(file, weights_only=True)
        with self.console.status("Looking for nearest neighbours."):
            for position, layer in enumerate(report.layers):
                for source in ("class", "mean") if layer.has_class else ("mean",):
                    if (position, source) not in known:
                        start = time.perf_counter()
                        result = nearest_neighbours(
                            train, test, position, source, holdout=HOLDOUT, device=self.args.device
                        )
                        pairs = [{**vars(pair), "chosen": pair is result.chosen} for pair in result.pairs]
                        known[position, source] = pairs
                        self._keep(file, known)
                        self.spend("k-NN", time.perf_counter() - start)
                    entries = known[position, source]
                    pairs_found = [
                        Neighbours(**{key: value for key, value in entry.items() if key != "chosen"})
                        for entry in entries
                    ]
                    chosen = next(pair for pair, entry in zip(pairs_found, entries) if entry["chosen"])
                    report.neighbours.append(LayerNeighbours(position, source, NeighboursResult(pairs_found, chosen)))
        report.seconds["k-NN"] = self.seconds["k-NN"]

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
            file = self.state / f"few-shot-{size}-{args.draws}.pt"
            if not file.exists():
                start = time.perf_counter()
                images = size * (int(present.sum()) if isinstance(size, float) else len(present))
                steps = max(1, int(images) // self.batch_size)
                epochs = max(args.epochs, math.ceil(FEW_SHOT_STEPS / steps))
                with _progress(self.console) as progress:
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
                self._keep(file, [asdict(result) for result in results])
                self.spend("few-shot", time.perf_counter() - start)
            report.few_shot += [FewShotResult(**entry) for entry in torch.load(file, weights_only=True)]
        report.seconds["few-shot"] = self.seconds.get("few-shot", 0.0)

    def spend(self, what: str, seconds: float) -> None:
        """Count time that a part of the work took."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds
        with atomic_path(self.state / "seconds.json") as temporary:
            temporary.write_text(json.dumps(self.seconds))

    @staticmethod
    def _keep(file: Path, content: Any) -> None:
        with atomic_path(file) as temporary:
            torch.save(content, temporary)

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


def _picture(image: Tensor, images: _Images) -> Image.Image:
    """What the backbone saw."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _count(head: Head) -> int:
    return sum(parameter.numel() for parameter in head.parameters())


def _print(report: Report, console: Console) -> None:
    """The best of each pooling."""
    reference = report.reference()
    p = {test.other: f"{test.p:.2g}" for test in report.tests()}
    against = "" if reference is None else report.name(reference)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("head", "layer", "test, %", "95 % interval", "parameters", f"p against {against}"):
        table.add_column(title, justify="left" if title in ("head", "layer") else "right", no_wrap=True)
    rows: list[tuple[LayerNeighbours | HeadResult, str, str, Any, int]] = [
        (entry, f"k-NN {entry.source}", report.layers[entry.layer].name, entry.result.chosen, 0)
        for entry in report.best_neighbours()
    ]
    rows += [(result, result.spec.pooling, result.layer, result.best, _count(result.head)) for result in report.best()]
    for entry, name, layer, score, parameters in rows:
        low, high = (f"{100 * end:.1f}" for end in score.interval) if score else ("–", "–")
        accuracy = percent(score.accuracy) if score else "–"
        last = "" if entry is reference else p.get(report.name(entry), "–")
        table.add_row(name, layer, accuracy, f"{low} to {high}", f"{parameters:,}", last)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
