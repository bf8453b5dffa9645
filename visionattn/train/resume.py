"""Safe interruption and exact resume."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from visionattn.errors import CheckpointError, VisionAttnError, shorten

__all__ = ["ExactResume", "Interrupted"]


class Interrupted(VisionAttnError):
    """Training was stopped by a signal, Ctrl-C or SIGTERM; its state is saved in `checkpoint`.

    Attributes:
        checkpoint: The file.
        signum: The signal.
    """

    def __init__(self, checkpoint: Path, signum: int = signal.SIGINT) -> None:
        by = " by SIGTERM" if signum == signal.SIGTERM else ""
        super().__init__(f"Stopped{by}. The state is saved in {checkpoint}.")
        self.checkpoint = checkpoint
        self.signum = signum


def _random_state() -> dict[str, Any]:
    """States of all global generators, as tensors and numbers that a weights-only load accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    name, keys, position, has_gauss, cached = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate((version, tuple(internal.tolist()), gauss))


class ExactResume(Callback):
    """Makes a resumed run equal to an uninterrupted one, and Ctrl-C and SIGTERM safe ways to interrupt it.

    Lightning restores weights, optimizer, schedule and counters. This callback adds the states of the random generators
    of torch, CUDA, numpy (used by timm's Mixup) and Python, for each rank, and the position of a `ResumableLoader`.
    (Lightning saves that position too, but does not restore it once the number of updates was queried, which every
    schedule does.)

    After the first signal training continues to the next safe point, saves `last.ckpt` there and raises `Interrupted`;
    a second signal aborts at once. A safe point is the end of an update (gradients not yet applied are not saved)
    without a following validation (Lightning would skip it after a resume), or else the start of the next epoch.
    Ranks agree on it.
    """

    def __init__(self) -> None:
        self._loader: Any = None
        self._to_restore: dict[str, Any] = {}
        self._states: tuple[int, int] | None = None  # numbers of optimizers and schedules in the checkpoint
        self._updates = 0
        self._signum = 0
        self._saved: Path | None = None
        self._previous_handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def state_dict(self) -> dict[str, Any]:
        """Random states of all ranks, and the position in the data."""
        ranks: list[Any] = [_random_state()]
        if torch.distributed.is_initialized():
            state, ranks = ranks[0], [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, state)
        return {"ranks": ranks, "loader": self._loader.state_dict() if self._loader is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._to_restore = state_dict

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Record the end of an epoch if the next has just begun: Lightning would skip that one on resume."""
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        if epochs["current"]["ready"] > epochs["current"]["started"] > 0:
            for period in ("current", "total"):
                epochs[period]["ready"] -= 1
                epochs[period]["completed"] -= 1

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse checkpoints with weights only, and keep Lightning from counting an epoch twice.

        The latter occurs if max_steps is set and the checkpoint was saved at the end of an epoch.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(
                "The checkpoint holds weights only, so training cannot be resumed from it. To start a new training "
                "from these weights, give the file as model.model_args.checkpoint_path instead."
            )
        self._states = len(checkpoint["optimizer_states"]), len(checkpoint.get("lr_schedulers", ()))
        try:
            loops = checkpoint["loops"]["fit_loop"]
            epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
            counts = [*epochs["total"].values(), *epochs["current"].values(), *batches["total"].values()]
            if not all(isinstance(count, int) and count >= 0 for count in counts):
                raise ValueError("a count of epochs or batches is not a valid number")
            if trainer.max_steps != -1 and epochs["current"]["processed"] > epochs["current"]["completed"]:
                # Mark the last batch as done but not yet counted, as Lightning expects.
                for period in ("current", "total"):
                    epochs[period]["processed"] -= 1
                    batches[period]["completed"] -= 1
                loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"Training cannot be resumed from the checkpoint: its progress is damaged ({shorten(repr(error))})."
            ) from error

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go to the position in the data, and install signal handlers."""
        # Lightning restores as many states as there are, and silently restarts the others.
        if self._states not in (None, (len(trainer.optimizers), len(trainer.lr_scheduler_configs))):
            raise CheckpointError(
                f"Training cannot be resumed from the checkpoint: it has the states of {self._states[0]} optimizers "
                f"and {self._states[1]} schedules, but the training has {len(trainer.optimizers)} and "
                f"{len(trainer.lr_scheduler_configs)}."
            )
        self._loader = trainer.train_dataloader if hasattr(trainer.train_dataloader, "load_state_dict") else None
        if self._loader is not None and self._to_restore.get("loader"):
            self._loader.load_state_dict(self._to_restore["loader"])
        self._updates, self._saved = trainer.global_step, None
        self._listen()

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Install signal handlers before loading processes inherit other ones."""
        self._listen()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """A safe point: the previous epoch is validated and saved."""
        if trainer.current_epoch > 0 and self._must_stop(trainer):
            raise Interrupted(self._save(trainer), self._signum or signal.SIGINT)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the last batch was logged; restore the random states before the first draw."""
        if self._saved is not None:
            raise Interrupted(self._saved, self._signum or signal.SIGINT)
        ranks = self._to_restore.get("ranks", [])
        self._to_restore = {}
        if len(ranks) == trainer.world_size:
            _set_random_state(ranks[trainer.global_rank])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A safe point after an update, unless the epoch ends."""
        updated, self._updates = trainer.global_step != self._updates, trainer.global_step
        if updated and not trainer.is_last_batch and self._must_stop(trainer):
            self._saved = self._save(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Not a safe point after all."""
        self._saved = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore_handlers()

    def _must_stop(self, trainer: Any) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self._signum), all=False)

    def _save(self, trainer: Any) -> Path:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        checkpoint = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
        return checkpoint

    def _listen(self) -> None:
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread() and not self._previous_handlers:
            self._signum, self._process = 0, os.getpid()
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        # A second signal uses the original handler.
        self._restore_handlers()
        if os.getpid() != self._process:
            return  # a loading process, needed until the training stops
        if getattr(rank_zero_only, "rank", 0) == 0:
            again = "Press Ctrl-C again" if signum == signal.SIGINT else "Send SIGTERM again"
            print(f"\nStopping as soon as the state can be saved. {again} to abort without saving.", flush=True)

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}
