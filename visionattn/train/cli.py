"""The commands `visionattn fit`, `validate`, `test` and `predict`: LightningCLI over the tasks of this package."""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import errno
import importlib.resources
import inspect
import itertools
import logging
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from visionattn.checkpoints import read_card
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import CheckpointError, ConfigError, UnknownNameError, VisionAttnError, require
from visionattn.files import atomic_path
from visionattn.train.checkpoint_io import AtomicCheckpointIO
from visionattn.train.classify import ClassifyTask
from visionattn.train.from_checkpoint import expand_positionals, said_by_checkpoint, without_sources
from visionattn.train.restore import RestoreTask
from visionattn.train.resume import ExactResume, Interrupted
from visionattn.train.run_logger import ResumedLogger
from visionattn.train.throughput import ImagesPerSecond

__all__ = ["TrainCLI", "main", "recipes"]

_COMMANDS = ("fit", "validate", "test", "predict")
# Lightning's warnings that a checkpoint holds what only training needs.
_ONLY_FOR_TRAINING = "Be aware that when using `ckpt_path`|The dirpath has changed"


def recipes() -> dict[str, Path]:
    """The packaged recipes: name, such as `classify/minimal_vit_digits`, and file."""
    root = importlib.resources.files("visionattn") / "configs"
    folders = sorted((folder for folder in root.iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    return {
        f"{folder.name}/{Path(file.name).stem}": Path(str(file))
        for folder in folders
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def find_recipe(name: str) -> Path:
    """A file as it is, or the packaged recipe of that name, with or without its folder.

    Raises:
        UnknownNameError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = recipes()
    matches = [key for key in packaged if name.removesuffix(".yaml") in (key, key.split("/")[1])]
    if len(matches) == 1:
        return packaged[matches[0]]
    raise UnknownNameError(f"There is no file and no recipe {name!r}. The recipes are: {', '.join(packaged)}.")


def _resolve_configs(args: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments with recipe names replaced by files, and these files."""
    resolved, configs = [], []
    for before, arg in itertools.pairwise(["", *args]):
        option, equals, value = arg.partition("=")
        if before in ("--config", "-c"):
            configs.append(find_recipe(arg))
            arg = str(configs[-1])
        elif equals and option in ("--config", "-c"):
            configs.append(find_recipe(value))
            arg = f"{option}={configs[-1]}"
        resolved.append(arg)
    return resolved, configs


def _as_list(value: Any) -> list[Any]:
    """What may be given as nothing, one thing or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


class TrainCLI(LightningCLI):
    """LightningCLI with this package's defaults.

    Any LightningModule and LightningDataModule may be named by `model.class_path` and `data.class_path`; without them
    the task is classification. The best checkpoint is the one with the highest `monitor` of the task's class. Runs land
    in `runs/RECIPE/version_N`: config.yaml, metrics.csv, checkpoints/best.ckpt and checkpoints/last.ckpt. A run that is
    resumed from its last.ckpt goes on in its own folder.

    Args:
        args: Arguments of the command line.
    """

    trainer: Any

    def __init__(self, args: Sequence[str]) -> None:
        resolved, configs = _resolve_configs(expand_positionals(args))
        self._run_name = configs[-1].stem if configs else None
        if self._run_name == "config":
            self._run_name = configs[-1].resolve().parent.parent.name
        more = (
            f"Recipes: {', '.join(recipes())}. More settings: --model.help ClassifyTask, --data.help ClassifyData; for "
            "super-resolution --model.help RestoreTask, --data.help RestoreData; for retrieval --model.help "
            "RetrieveTask, --data.help RetrieveData; for stereo and flow --model.help MatchTask, --data.help MatchData."
        )
        parsers = {
            command: {
                "usage": f"visionattn {command} --config RECIPE [--SETTING VALUE ...]",
                "description": more,
                "exit_on_error": False,
            }
            for command in _COMMANDS
        }
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            parser_kwargs={"prog": "visionattn", "exit_on_error": False, **parsers},
            args=resolved,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Default task, link and checkpoints."""
        parser.set_defaults(
            {
                "model": {"class_path": "visionattn.train.classify.ClassifyTask"},
                "data": {"class_path": "visionattn.data.classify.ClassifyData"},
            }
        )
        for source, target in (("num_classes", "num_classes"), ("attribute_values", "attributes")):
            parser.link_arguments(f"data.{source}", f"model.init_args.{target}", apply_on="instantiate")
        # Lightning's save_last saves the last best one, not the last: a second callback does.
        for name, settings in {
            "best": {"filename": "best", "mode": "max"},
            "last": {"filename": "last"},
        }.items():
            parser.add_lightning_class_args(ModelCheckpoint, name)
            parser.set_defaults({f"{name}.{key}": value for key, value in settings.items()})
            parser.set_defaults({f"{name}.enable_version_counter": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with errors in plain words."""
        try:
            with said_by_checkpoint(args) as before:
                self.config = parser.parse_args([*args[:1], *before, *args[1:]])
        except argparse.ArgumentError as error:
            raise ConfigError(self._explain(str(error), args)) from error
        given = self.config.get(self.config.subcommand)
        if given is not None and given.best.monitor is None:
            module, _, name = given.model.class_path.rpartition(".")
            task = getattr(importlib.import_module(module), name)
            given.best.monitor = getattr(task, "monitor", "val/accuracy")

    def _explain(self, message: str, args: Sequence[str]) -> str:
        """Jsonargparse's message without its tree of types, and the name that was probably meant."""
        noise = r"does not validate against|subtypes:|errors:|given value|expected a <class 'nonetype'>"
        lines = [line.strip(" -") for line in message.splitlines()]
        text = " ".join(line for line in lines if line and not re.match(noise, line, re.IGNORECASE))
        text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
        command = next((arg for arg in args if arg in _COMMANDS), None)
        option = re.search(
            r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)",
            text,
        )
        if option is None or command is None:
            return re.sub(r"Parser key \"(\w+)\": Problem with given class_path '[^']+': Parser key \"", r'"\1.', text)
        unknown = next(group for group in option.groups() if group)
        section = re.match(r'Parser key "(\w+)"', text)
        class_path = re.search(r"class_path '([^']+)'", text)
        if section and class_path:
            module, _, name = class_path.group(1).rpartition(".")
            known = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
            prefix = f"{section.group(1)}."
        else:
            known, prefix = list(self._parser(command).get_defaults().keys(branches=True)), ""
        nearest = [prefix + name for name in difflib.get_close_matches(unknown, known, cutoff=0.5)]
        hint = f"Did you mean {', '.join(nearest)}?" if nearest else f"visionattn {command} --help lists the settings."
        return f"There is no setting {prefix}{unknown}. {hint}"

    def _parse_ckpt_path(self) -> None:
        # Lightning would put the checkpoint's model in the place of the one that was asked for.
        pass

    def before_instantiate_classes(self) -> None:
        """Only training writes its configuration, and needs what only training wrote."""
        if self.subcommand != "fit":
            self.save_config_callback = None
            warnings.filterwarnings("ignore", message=_ONLY_FOR_TRAINING)

    def instantiate_classes(self) -> None:
        """Instantiate; a model that gets a checkpoint's weights looks for no others."""
        given = self.config[self.subcommand]
        self._configured = self.config
        ckpt_path = given.get("ckpt_path")
        card = None
        if ckpt_path is not None and Path(ckpt_path).is_file():
            card = read_card(ckpt_path)
            self.config = self.config.clone()
            model = self.config[self.subcommand].model
            for key, value in without_sources(model.init_args.as_dict(), card).items():
                model.init_args[key] = value
        super().instantiate_classes()
        if card is not None and self.subcommand != "fit" and hasattr(self.model, "net"):
            # Of a checkpoint of another model, the check of its weights says more.
            with contextlib.suppress(CheckpointError):
                card.apply(self.model.net)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what every run has."""
        self.config = self._configured  # which a run saves
        given = self._get(self.config_init, "trainer")
        callbacks = _as_list(given.callbacks)
        if self.subcommand == "fit":
            callbacks += [ImagesPerSecond(), ExactResume()]
        else:
            callbacks = [callback for callback in callbacks if not isinstance(callback, WeightAveraging)]
            callbacks += [ImagesPerSecond()]
        if given.enable_progress_bar is not False and not any(isinstance(c, RichProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar())
        kwargs["callbacks"] = callbacks
        kwargs["plugins"] = [*_as_list(given.plugins), AtomicCheckpointIO()]
        if given.logger is None:
            kwargs["logger"] = self._logger() if self.subcommand == "fit" else False
        return super().instantiate_trainer(**kwargs)

    def _logger(self) -> CSVLogger:
        """A new folder, or that of the run that is resumed."""
        ckpt_path = self._get(self.config_init, "ckpt_path")
        if ckpt_path is not None:
            folder = Path(ckpt_path).resolve().parent.parent
            if (folder / "config.yaml").is_file():
                checkpoint = AtomicCheckpointIO().load_checkpoint(ckpt_path, weights_only=True)
                return ResumedLogger(folder, checkpoint["global_step"])
        name = self._run_name or getattr(self.model.hparams, "name", type(self.model).__name__)
        return CSVLogger(str(Path("runs").resolve()), name=name)

    def before_fit(self) -> None:
        """Refuse what Lightning would only warn about."""
        check_averaging(self.trainer)

    def after_fit(self) -> None:
        """Validate the best checkpoint, test it where the task has a test, and sum up."""
        trainer = self.trainer
        if trainer.fast_dev_run:
            return
        measured = {"train": dict(trainer.callback_metrics)}
        # Averaged weights are the checkpoint's weights; the callback would put back the others.
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, WeightAveraging)]
        warnings.filterwarnings("ignore", message=_ONLY_FOR_TRAINING)
        best, last = self._get(self.config_init, "best"), self._get(self.config_init, "last")
        chosen = best.best_model_path or last.best_model_path or None
        evaluations = {"val": trainer.validate}
        if is_overridden("test_step", self.model):
            evaluations["test"] = trainer.test
        for part, evaluate in evaluations.items():
            evaluate(self.model, datamodule=self.datamodule, ckpt_path=chosen, verbose=False)
            measured[part] = dict(trainer.callback_metrics)
        self._print_summary(measured)
        self._print(f"The run is in {trainer.log_dir}; the weights of this table in {chosen}.")

    def validate(self, **kwargs: Any) -> None:
        """Validate and print."""
        self._check_weights()
        self.trainer.validate(**{**kwargs, "verbose": False})
        self._print_summary({"val": dict(self.trainer.callback_metrics)})

    def test(self, **kwargs: Any) -> None:
        """Test and print."""
        self._check_weights()
        self.trainer.test(**{**kwargs, "verbose": False})
        self._print_summary({"test": dict(self.trainer.callback_metrics)})

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write predictions.csv."""
        self._check_weights()
        outputs = self.trainer.predict(**{**kwargs, "return_predictions": True})
        if isinstance(self.model, ClassifyTask):
            self._write_predictions(outputs)

    def _check_weights(self) -> None:
        """Refuse to measure what nobody trained."""
        given = self.model.hparams
        pretrained = given.get("pretrained", True) or "checkpoint_path" in (given.get("model_args") or {})
        if self._get(self.config_init, "ckpt_path") is None and not pretrained:
            raise ConfigError("The model has no trained weights: give --ckpt_path FILE, or set model.pretrained.")

    def _write_predictions(self, outputs: list[dict[str, torch.Tensor]]) -> None:
        trainer, data = self.trainer, self.datamodule
        names = data.predicted_names() if hasattr(data, "predicted_names") else itertools.count()
        classes = getattr(data, "class_names", None)
        # Ranks take turns.
        names = itertools.islice(names, trainer.global_rank, None, trainer.world_size)
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{rank}.csv"
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "class", "probability"])
            for output in outputs:
                for probabilities, label in zip(output["probabilities"], output["labels"].tolist()):
                    named = classes[label] if classes and label < len(classes) else label
                    writer.writerow([next(names), label, named, f"{probabilities[label].item():.6f}"])
        self._print(f"The predictions are in {path}.")

    def _print_summary(self, measured: dict[str, dict[str, torch.Tensor]]) -> None:
        """Table of what was measured in each part, and of what the model costs."""
        rows: dict[str, dict[str, str]] = {}
        for part, metrics in measured.items():
            for key, value in metrics.items():
                prefix, _, measure = key.partition("/")
                if prefix == part and not (part == "train" and measure != "images_per_second"):
                    shown = f"{value:,.0f}" if measure == "images_per_second" else f"{value:.4f}"
                    rows.setdefault(measure.replace("_per_", "/").replace("_", " "), {})[part] = shown
        table = Table(title=getattr(self.model.hparams, "name", type(self.model).__name__))
        table.add_column("measure")
        for part in measured:
            table.add_column({"train": "training", "val": "validation", "test": "test"}[part], justify="right")
        for measure, values in rows.items():
            table.add_row(measure, *(values.get(part, "") for part in measured))
        net = self.model.for_use() if isinstance(self.model, RestoreTask) else getattr(self.model, "net", None)
        shape = getattr(self.datamodule, "image_shape", None)
        if net is not None and shape is not None:
            empty = [""] * (len(measured) - 1)
            table.add_section()
            table.add_row("parameters", *empty, f"{count_parameters(net):,}")
            inputs = [shape] * len(getattr(net, "input_names", ("image",)))
            table.add_row("multiply-accumulates", *empty, f"{count_macs(net, *inputs):,}")
        self._print(table)

    def _print(self, what: Any) -> None:
        if self.trainer.is_global_zero:
            Console(soft_wrap=True).print(what)


def check_averaging(trainer: Any) -> None:
    """Refuse averaged weights of a sharded model.

    Raises:
        ConfigError: Lightning's averaging copies the whole model to each device, before it is sharded.
    """
    sharding = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    averaging = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    if averaging and isinstance(trainer.strategy, sharding):
        raise ConfigError(
            f"{averaging[0]} does not work with sharded models ({type(trainer.strategy).__name__}): it would hold the "
            "whole model on each device and average wrong weights. Use the strategy ddp, or leave the averaging out."
        )


def _resume_command(args: Sequence[str], checkpoint: Path) -> str:
    """What to type in order to go on."""
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        return shlex.join(["visionattn", "fit", "--config", str(config), "--ckpt_path", str(checkpoint)])
    return shlex.join(["visionattn", *args, "--ckpt_path", str(checkpoint)])


def _explained(error: BaseException | None) -> str | None:
    """The message of a user's mistake or a full disk; None for a fault of the program."""
    # jsonargparse wraps what the constructors of model and data raise.
    while error is not None:
        if isinstance(error, (VisionAttnError, MisconfigurationException)):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"Could not write {error.filename or 'a file'}: {error.strerror}."
        error = error.__cause__ or error.__context__
    return None


def main(args: Sequence[str]) -> int:
    """Run one of the four commands.

    Args:
        args: Arguments behind `visionattn`, the command first.

    Returns:
        Exit code: 0, 2 after a message about wrong input, 130 after Ctrl-C.
    """
    # The table at the end says what Lightning's notes would, and its advertisements are no use here.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for note in (".*LeafSpec", "The number of training batches", "Checkpoint directory"):
        warnings.filterwarnings("ignore", message=note)
    try:
        require("jsonargparse", "train")
        TrainCLI(args)
        # Lightning leaves the processes joined, and their threads abort now and then when Python ends under them.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Interrupted as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"{stop} Go on with:\n  {_resume_command(args, stop.checkpoint)}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("Aborted.", file=sys.stderr)
        return 130
    except SystemExit as stop:
        # Lightning turns a Ctrl-C into an exit.
        if isinstance(stop.__context__, KeyboardInterrupt):
            print("Aborted without saving; the last checkpoint saved before is untouched.", file=sys.stderr)
            return 130
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        print(f"visionattn: {message}", file=sys.stderr)
        return 2
    return 0
