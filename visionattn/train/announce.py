"""Console output of a run: a summary at its start, and one line per epoch if no progress bar can be drawn."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from visionattn.data.module import DataModule
from visionattn.errors import DataError, shorten

__all__ = ["Announcement", "EpochLines", "run_title", "say"]

_SPLITS = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}


def say(trainer: Any, what: Any) -> None:
    """Print, on the first rank only."""
    if trainer.is_global_zero:
        Console(soft_wrap=True, highlight=False).print(what, markup=False)


def run_title(model: Any) -> str:
    """Title of a run: the name of its network, or of its task."""
    return getattr(model.hparams, "name", type(model).__name__)


class Announcement(Callback):
    """Prints at the start of a run: device, images per split and class, what is left out, and the run's folder.

    Attributes:
        has_begun: Whether processing of batches has begun, so that a checkpoint has been restored.
        can_test: Whether the data have a test split, or test on the validation split.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.can_test = True
        self._said = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Print the summary, once."""
        if self._said:
            return
        self._said = True
        # All ranks open their data now, so that an unusable folder ends all of them.
        lines = self._lines(trainer, pl_module)
        folder = trainer.log_dir
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run:
            lines.append(f"run folder: {folder}")
        say(trainer, "\n".join(lines))

    def _lines(self, trainer: Any, pl_module: Any) -> list[str]:
        lines = [f"{run_title(pl_module)} on {_device(trainer)}"]
        fitting = trainer.state.fn == TrainerFn.FITTING
        data = trainer.datamodule
        if fitting:
            # A checkpoint to start from decides the size if the data do not.
            size = getattr(data, "image_shape", None)
            lines[0] += f", {_length(trainer)}" + (f", images of {' x '.join(map(str, size))}" if size else "")
        if not isinstance(data, DataModule):
            return lines
        tests = is_overridden("test_step", pl_module)
        splits = {
            TrainerFn.FITTING: ("train", "val", "test") if tests else ("train", "val"),
            TrainerFn.VALIDATING: ("val",),
            TrainerFn.TESTING: ("test",),
            TrainerFn.PREDICTING: ("predict",),
        }[trainer.state.fn]
        for split in splits:
            try:
                if split == "test" and data.tests_on_validation:
                    lines.append("test: there is no test split; the validation split is used instead")
                else:
                    lines.append(f"{_SPLITS[split]}: {data.describe(split)}")
            except DataError as error:
                if split != "test" or not fitting:
                    raise
                # Training works without a test split.
                self.can_test = False
                lines.append(f"test: none ({shorten(error, 200)})")
        lines += [f"left out in {shorten(line, 400)}" for line in data.left_out()]
        return lines

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Processing has begun."""
        self.has_begun = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Processing has begun."""
        self.has_begun = True

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Processing has begun."""
        self.has_begun = True

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Processing has begun."""
        self.has_begun = True

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Processing has begun."""
        self.has_begun = True


def _device(trainer: Any) -> str:
    device = trainer.strategy.root_device
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device.type)
    many = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return f"{name}{many}, precision {trainer.precision}"


def _length(trainer: Any) -> str:
    if trainer.max_steps not in (None, -1):
        return f"{trainer.max_steps:,} updates"
    return "epochs without a limit" if trainer.max_epochs == -1 else f"{trainer.max_epochs:,} epochs"


class EpochLines(ProgressBar):
    """One line per epoch, with the metrics that a progress bar would show, for output that is not a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._since = time.monotonic()

    def disable(self) -> None:
        """Called by Lightning's tuners; one line per epoch needs no silencing."""

    def enable(self) -> None:
        """Counterpart of `disable`."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the timer."""
        self._since = time.monotonic()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the line."""
        measures = self.get_metrics(trainer, pl_module)
        measures.pop("v_num", None)
        shown = [f"{key} {value:.4g}" for key, value in measures.items() if isinstance(value, (int, float))]
        last = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        seconds = time.monotonic() - self._since
        say(trainer, f"epoch {trainer.current_epoch + 1}{last}: {', '.join([*shown, f'{seconds:.1f} s'])}")
