"""The commands `visionattn fit`, `validate`, `test` and `predict`: LightningCLI over the tasks of this package."""

from __future__ import annotations

import contextlib
import importlib
import logging
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from visionattn.allocator import keep_freed_memory
from visionattn.checkpoints import read_card
from visionattn.data.module import DataModule
from visionattn.errors import CheckpointError, ConfigError, require, shorten
from visionattn.files import check_output
from visionattn.train.announce import Announcement, EpochLines, run_title, say
from visionattn.train.checkpoint_io import AtomicCheckpointIO
from visionattn.train.configuration import (
    DEFAULT_RECIPE,
    check_numbers,
    explain,
    explain_fault,
    explain_option,
    use_bounded_yaml,
    with_recipe,
)
from visionattn.train.from_checkpoint import expand_positionals, said_by_checkpoint, without_sources
from visionattn.train.optimization import FROM_DATA, OptimizedTask
from visionattn.train.outputs import check_report, report_test, tell_skipped, write_summary
from visionattn.train.predictions import check_form, predictions_path, write_predictions
from visionattn.train.recipes import find_recipe, recipes, resolve_configs
from visionattn.train.resume import ExactResume, Interrupted
from visionattn.train.run_logger import ResumedLogger
from visionattn.train.throughput import ImagesPerSecond

__all__ = ["TrainCLI", "find_recipe", "main", "recipes"]

_ARGUMENTS = {"fit": "RECIPE [FOLDER]", **dict.fromkeys(("validate", "test", "predict"), "CHECKPOINT [FOLDER]")}
_COMMANDS = tuple(_ARGUMENTS)
# Lightning's warnings about checkpoint entries that only training needs.
LONGEST_MESSAGE = 1000
_ONLY_FOR_TRAINING = "Be aware that when using `ckpt_path`|The dirpath has changed"


def _as_list(value: Any) -> list[Any]:
    """A value that can be None, a single item or a list, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


class TrainCLI(LightningCLI):
    """LightningCLI with this package's defaults.

    `model.class_path` and `data.class_path` accept any LightningModule and LightningDataModule; the default
    task is classification. The best checkpoint is the one with the highest `monitor` of the task's class. Runs are
    written to `runs/RECIPE/version_N`: config.yaml, metrics.csv, checkpoints/best.ckpt and checkpoints/last.ckpt. A run
    that is resumed from its last.ckpt continues in its own folder.

    Args:
        args: Command-line arguments.
    """

    trainer: Any
    exit_code = 0

    def __init__(self, args: Sequence[str]) -> None:
        self._running = False
        self._announcement = Announcement()
        asked = expand_positionals(args)
        args = with_recipe(asked)
        if args != asked and getattr(rank_zero_only, "rank", 0) == 0:
            print(f"No recipe is given: using {DEFAULT_RECIPE}, for images in one folder per class.")
        resolved, configs = resolve_configs(args)
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
                "usage": f"visionattn {command} {_ARGUMENTS[command]} [--SETTING VALUE ...]",
                "description": more,
                "exit_on_error": False,
            }
            for command in _COMMANDS
        }
        try:
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
        except Exception as error:
            if self._running:
                raise
            raise ConfigError(explain(error)) from error  # classes named in a configuration raise almost any exception

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Default task, linked arguments and checkpoints."""
        parser.set_defaults(
            {
                "model": {"class_path": "visionattn.train.classify.ClassifyTask"},
                "data": {"class_path": "visionattn.data.classify.ClassifyData"},
            }
        )
        for argument, source in FROM_DATA.items():
            parser.link_arguments(f"data.{source}", f"model.init_args.{argument}", apply_on="instantiate")
        # Lightning's save_last keeps the last best checkpoint, not the last one: a second callback does.
        for name, settings in {
            "best": {"filename": "best", "mode": "max"},
            "last": {"filename": "last"},
        }.items():
            parser.add_lightning_class_args(ModelCheckpoint, name)
            parser.set_defaults({f"{name}.{key}": value for key, value in settings.items()})
            parser.set_defaults({f"{name}.enable_version_counter": False})

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = "checkpoint with the weights and, for fit, the state; --checkpoint FILE is an alias"
        if subcommand == "predict":
            parser.add_argument("--output", type=str | None, help=".csv or .json file (default: predictions.csv)")
            parser.add_argument("--top", type=int, default=1, help="number of most likely classes per image")
            parser.add_argument("--probabilities", action="store_true", help="write the probability of every class")
            parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
        if subcommand == "test":
            parser.add_argument("--output", type=str | None, help="folder for a report (classifiers only)")
            parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; errors are one line."""
        command = next((arg for arg in args if arg in _COMMANDS), None)
        try:
            with said_by_checkpoint(args) as before:
                self.config = parser.parse_args([*args[:1], *before, *args[1:]])
        except Exception as error:  # jsonargparse and named classes raise almost any exception
            settings = list(self._parser(command).get_defaults().keys(branches=True)) if command else []
            raise ConfigError(explain_option(error, args, settings, command)) from error
        check_numbers(self.config.get(self.config.subcommand))
        given = self.config.get(self.config.subcommand)
        if given is not None and given.best.monitor is None:
            module, _, name = given.model.class_path.rpartition(".")
            task = getattr(importlib.import_module(module), name)
            given.best.monitor = getattr(task, "monitor", OptimizedTask.monitor)

    def _parse_ckpt_path(self) -> None:
        # Lightning would replace the requested model by the checkpoint's.
        pass

    def before_instantiate_classes(self) -> None:
        """Write a configuration, and require training settings, for training only."""
        if self.subcommand != "fit":
            self.save_config_callback = None
            warnings.filterwarnings("ignore", message=_ONLY_FOR_TRAINING)

    def instantiate_classes(self) -> None:
        """Instantiate; a model that is restored from a checkpoint loads no other weights."""
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
            # For the checkpoint of another model, the check of its weights gives a better message.
            with contextlib.suppress(CheckpointError):
                card.apply(self.model.net)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the settings that every run has."""
        self.config = self._configured  # saved by the run
        given = self._get(self.config_init, "trainer")
        callbacks = _as_list(given.callbacks)
        if self.subcommand == "fit":
            callbacks += [ImagesPerSecond(), ExactResume()]
        else:
            callbacks = [callback for callback in callbacks if not isinstance(callback, WeightAveraging)]
            callbacks += [ImagesPerSecond()]
        if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else EpochLines())
        callbacks.append(self._announcement)
        kwargs["callbacks"] = callbacks
        kwargs["plugins"] = [*_as_list(given.plugins), AtomicCheckpointIO()]
        if given.logger is None:
            kwargs["logger"] = self._logger() if self.subcommand == "fit" else False
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit" and isinstance(trainer.accelerator, CPUAccelerator):
            keep_freed_memory()
        return trainer

    def _logger(self) -> CSVLogger:
        """A new run folder, or that of the resumed run."""
        ckpt_path = self._get(self.config_init, "ckpt_path")
        if ckpt_path is not None:
            folder = Path(ckpt_path).resolve().parent.parent
            if (folder / "config.yaml").is_file():
                checkpoint = AtomicCheckpointIO().load_checkpoint(ckpt_path, weights_only=True)
                return ResumedLogger(folder, checkpoint["global_step"])
        name = self._run_name or run_title(self.model)
        runs = str(self._get(self.config_init, "trainer").default_root_dir or "runs")
        return CSVLogger(runs if "://" in runs else str(Path(runs).resolve()), name=name)

    def before_fit(self) -> None:
        """Raise errors where Lightning would only warn."""
        check_averaging(self.trainer)

    def after_fit(self) -> None:
        """Evaluate the best checkpoint on the validation and the test split, and print a summary."""
        trainer = self.trainer
        if trainer.fast_dev_run:
            return
        measured = {"train": dict(trainer.callback_metrics)}
        best, last = self._get(self.config_init, "best"), self._get(self.config_init, "last")
        chosen = best.best_model_path or last.best_model_path or None
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
            # The average is computed at the end of training, after the other checkpoints.
            chosen = str(Path(best.dirpath or trainer.default_root_dir) / "averaged.ckpt")
            trainer.save_checkpoint(chosen)
        # Averaged weights are the checkpoint's weights; the callback would restore the others.
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, WeightAveraging)]
        warnings.filterwarnings("ignore", message=_ONLY_FOR_TRAINING)
        evaluations = {"val": trainer.validate}
        if is_overridden("test_step", self.model) and self._announcement.can_test:
            evaluations["test"] = trainer.test
            if isinstance(self.datamodule, DataModule) and self.datamodule.tests_on_validation:
                del evaluations["val"]  # the same images
        for part, evaluate in evaluations.items():
            evaluate(self.model, datamodule=self.datamodule, ckpt_path=chosen, verbose=False)
            measured[part] = dict(trainer.callback_metrics)
        write_summary(self, measured)
        tell_skipped(self)
        if "test" in measured and self.model.hparams.get("report"):
            report_test(self, Path(trainer.log_dir or trainer.default_root_dir) / "report")
        say(trainer, f"The run is in {trainer.log_dir}; the weights of this table are in {chosen}.")

    def validate(self, **kwargs: Any) -> None:
        """Validate and print."""
        self._check_weights()
        self.trainer.validate(**{**kwargs, "verbose": False})
        write_summary(self, {"val": dict(self.trainer.callback_metrics)})
        tell_skipped(self)

    def test(self, **kwargs: Any) -> None:
        """Test and print; with --output, write a report."""
        self._check_weights()
        output = self._get(self.config_init, "output")
        if output is not None:
            check_report(self, output)
        self.trainer.test(**{**kwargs, "verbose": False})
        write_summary(self, {"test": dict(self.trainer.callback_metrics)})
        tell_skipped(self)
        if output is not None:
            report_test(self, Path(output))

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write predictions.csv."""
        self._check_weights()
        writes = bool(getattr(self.model, "prediction_columns", ()))
        form = check_form(self, self._get(self.config_init, "top"), self._get(self.config_init, "probabilities"))
        path = predictions_path(self.trainer, self._get(self.config_init, "output"))
        if writes:
            check_output(path, self._get(self.config_init, "overwrite"), (".csv", ".json"))
        outputs = self.trainer.predict(**{**kwargs, "return_predictions": True})
        if writes:
            write_predictions(self, outputs, path, form)
        self.exit_code = int(tell_skipped(self))

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; explain why a checkpoint cannot be restored, and remove the folder of a run that never began."""
        self._running = True
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if self._announcement.has_begun or explain_fault(error) is not None:
                raise
            ckpt_path = self._get(self.config_init, "ckpt_path")
            reason = f"{type(error).__name__}: {shorten(error, 200)}"
            if ckpt_path is None:
                raise ConfigError(f"The run could not start ({reason}).") from error
            raise CheckpointError(f"The run could not start from {shorten(ckpt_path)} ({reason}).") from error
        finally:
            if subcommand == "fit":
                _remove_unused(self.trainer)

    def _check_weights(self) -> None:
        """Refuse to evaluate untrained weights."""
        if self._get(self.config_init, "ckpt_path") is None and not getattr(self.model, "starts_trained", True):
            raise ConfigError("The model has no trained weights: give --checkpoint FILE, or set model.pretrained.")


def check_averaging(trainer: Any) -> None:
    """Refuse weight averaging for a sharded model.

    Raises:
        ConfigError: Lightning's averaging copies the whole model to each device, before it is sharded.
    """
    sharding = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
    averaging = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    if averaging and isinstance(trainer.strategy, sharding):
        raise ConfigError(
            f"{averaging[0]} does not work with sharded models ({type(trainer.strategy).__name__}): it would hold the "
            "whole model on each device and average wrong weights. Use the strategy ddp, or remove the averaging."
        )


def _resume_command(args: Sequence[str], checkpoint: Path) -> str:
    """The command line that resumes a run."""
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        return shlex.join(["visionattn", "fit", "--config", str(config), "--checkpoint", str(checkpoint)])
    return shlex.join(["visionattn", *args, "--checkpoint", str(checkpoint)])


def _remove_unused(trainer: Any) -> None:
    """Remove the folder of a run that ended before it had a checkpoint or any metrics."""
    logger = trainer.logger
    if type(logger) is not CSVLogger or not trainer.is_global_zero or "://" in logger.log_dir:
        return
    folder = Path(logger.log_dir)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if files <= {"config.yaml", "hparams.yaml"}:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in (folder.parent, folder.parent.parent):
            with contextlib.suppress(OSError):  # the folder holds other runs
                parent.rmdir()


def main(args: Sequence[str]) -> int:
    """Run one of the four commands.

    Args:
        args: Arguments after `visionattn`, the command first.

    Returns:
        Exit code: 0; 1 after a prediction that skipped images; 2 after an error message; 130 after Ctrl-C;
        143 after SIGTERM.
    """
    # The final table replaces these notes of Lightning, and its advertisements are not needed.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for note in (".*LeafSpec", "The number of training batches", "Checkpoint directory"):
        warnings.filterwarnings("ignore", message=note)
    try:
        require("jsonargparse", "train")
        use_bounded_yaml()
        exit_code = TrainCLI(args).exit_code
        # Lightning leaves processes to be joined, and their threads sometimes abort when Python exits.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Interrupted as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"{stop} Resume with:\n  {_resume_command(args, stop.checkpoint)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("Aborted.", file=sys.stderr)
        return 130
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit.
        if isinstance(stop.__context__, KeyboardInterrupt):
            print("Aborted without saving; the last saved checkpoint is untouched.", file=sys.stderr)
            return 130
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:
        message = explain_fault(error)
        if message is None:
            raise
        print(f"visionattn: {shorten(message, LONGEST_MESSAGE)}", file=sys.stderr)
        return 2
    return exit_code
