"""Optimizers and schedules of all tasks: timm's, with the schedule stepped at each update."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import timm
import timm.optim
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from visionattn import weights
from visionattn.card import KEY, Card, base_name
from visionattn.errors import CheckpointError, ConfigError, shorten
from visionattn.opening import is_file

__all__ = ["FROM_DATA", "SCHEDULES", "OptimizedTask"]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")

FROM_DATA = {"num_classes": "num_classes", "attributes": "attribute_values"}
"""Task arguments that follow from the data module: argument -> attribute of the data module."""


class OptimizedTask(LightningModule):
    """A task whose network is `net`, and its optimization.

    A task accepts these settings after its own, as `**optimization`, and lists those whose default it changes.

    Args:
        opt: Name of the optimizer, one of `timm.optim.list_optimizers()`.
        lr: Peak learning rate.
        weight_decay: Weight decay; not applied to norms, biases and what the model exempts.
        opt_args: Further arguments of the optimizer, such as `betas`.
        sched: Schedule, stepped at each update: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant or none.
        warmup_epochs: Epochs of linear warm-up, included in the total.
        min_lr: Learning rate at the end.
        sched_args: Further arguments of timm's `create_scheduler_v2`; to halve the rate at epochs 50 and 80, use
            multistep with `{decay_milestones: [50, 80], decay_rate: 0.5}`.
        channels_last: Use the channels_last memory format, which is faster for convolutions on GPUs.
        compile: Compile the model.

    Raises:
        ConfigError: The optimizer or schedule is unknown, or a number is out of range.
    """

    hparams: Any
    trainer: Any
    net: nn.Module
    monitor: ClassVar[str] = "val/accuracy"
    """The metric whose highest value selects the best checkpoint."""
    prediction_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of a prediction; empty if `visionattn predict` writes no file."""
    told: ClassVar[dict[str, str]] = {"name": "the model {!r}"}
    """Hyper-parameters that a checkpoint must share with the task, and how messages show their values."""

    def __init__(
        self,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        opt_args: dict[str, Any] | None = None,
        sched: str = "cosine",
        warmup_epochs: float = 0.0,
        min_lr: float = 1e-6,
        sched_args: dict[str, Any] | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # includes the task's: Lightning reads the frames of all constructors
        self.check_names()

    def check_names(self) -> None:
        """Refuse names that timm would reject only when training starts.

        Raises:
            ConfigError: The schedule or optimizer is unknown; similar names are suggested.
        """
        sched, opt, name = self.hparams.sched, self.hparams.opt, self.hparams.get("name")
        if isinstance(name, str) and not timm.is_model(name.split(".")[0]) and is_file(name):
            raise ConfigError(
                f"model.name must be a name; got the file {shorten(name)}: give the name of its model, and "
                f"the file by --model.model_args.checkpoint_path {shorten(name)}."
            )
        for name in ("lr", "weight_decay", "warmup_epochs", "min_lr"):
            if not 0 <= self.hparams[name] < math.inf:
                raise ConfigError(f"model.{name} must be a finite number, at least 0; got {self.hparams[name]}.")
        if sched not in SCHEDULES:
            raise ConfigError(f"model.sched must be one of {', '.join(map(repr, SCHEDULES))}; got {sched!r}.")
        if opt.lower() not in timm.optim.list_optimizers():
            known = [str(known) for known in timm.optim.list_optimizers()]
            nearest = difflib.get_close_matches(opt, known, cutoff=0.4)
            raise ConfigError(f"There is no optimizer {opt!r}. Similar names: {', '.join(nearest) or 'none'}.")

    @property
    def starts_trained(self) -> bool:
        """Whether the network started from trained weights."""
        # A task without `pretrained` has none to check.
        return self.hparams.get("pretrained", True) or "checkpoint_path" in (self.hparams.get("model_args") or {})

    def for_use(self) -> nn.Module:
        """The network for inference after training."""
        return self.net

    def prediction_rows(self, output: Any, class_names: list[str] | None) -> Iterator[list[Any]]:
        """The values of `prediction_columns` for each image of a batch, from the output of `predict_step`."""
        raise NotImplementedError

    @property
    def trained(self) -> nn.Module:
        """The module that the optimizer trains: the network."""
        return self.net

    @property
    def parameter_groups(self) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
        """Parameter groups with their own learning rates, in `lr_scale`; None for timm's groups."""
        return None

    @property
    def compiled(self) -> list[nn.Module]:
        """The modules that `compile` compiles: the network."""
        return [self.net]

    def setup(self, stage: str) -> None:
        """Set the memory format, and compile."""
        if self.hparams.channels_last:
            self.net.to(memory_format=torch.channels_last)  # convolutions return the memory format of their weights
        if self.hparams.compile:
            for module in self.compiled:
                # In place: torch.compile(module) would add a prefix to every key of the checkpoint.
                module.compile()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the learning rate, the highest of all layers."""
        # Lightning's LearningRateMonitor logs one column per parameter group, and needs a logger.
        self.log("train/lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how to use the network (`visionattn.card`): its construction, input images and classes."""
        data = getattr(self.trainer, "datamodule", None)
        config = {**getattr(data, "image_config", {}), "label_names": getattr(data, "class_names", None)}
        card = Card.of(self.net, config, self.hparams.get("attributes"))
        if card is not None:
            checkpoint[KEY] = card.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model or with invalid weights, before torch lists its keys."""
        saved = checkpoint.get("hyper_parameters")
        self.check_checkpoint(saved if isinstance(saved, dict) else {})
        state = checkpoint["state_dict"]
        if wrong := weights.mismatches(state, self.state_dict()):
            raise CheckpointError(
                f"The checkpoint does not fit the model {self.hparams.name!r}: {weights.name_some(wrong)}. Check "
                "model.model_args."
            )
        weights.check_values(state, self.state_dict(), "The checkpoint")
        if self._trainer is not None and self._trainer.state.fn != TrainerFn.FITTING:
            # Only training needs these entries.
            for key in ("loops", "callbacks"):
                checkpoint.pop(key, None)

    def check_checkpoint(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint with hyper-parameters of another model.

        Raises:
            CheckpointError: A hyper-parameter differs.
        """
        own = {**self.hparams, "name": base_name(self.hparams.name)}
        saved = {**saved, "name": base_name(saved.get("name", own["name"]))}
        for key, words in self.told.items():
            if key in saved and saved[key] != own[key]:
                raise CheckpointError(
                    f"The checkpoint is for {shorten(words.format(saved[key]))}, not for {words.format(own[key])}."
                )

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule."""
        given = self.hparams
        opt_args = dict(given.opt_args or {})
        if given.opt in ("adam", "adamw") and self.device.type == "cpu":
            opt_args.setdefault("fused", True)  # PyTorch's CPU default loops over the parameters
        optimizer = _make(
            "model.opt_args",
            timm.optim.create_optimizer_v2,
            self.trained,
            opt=given.opt,
            lr=given.lr,
            weight_decay=given.weight_decay,
            layer_decay=given.get("layer_decay"),
            param_group_fn=self.parameter_groups,
            **opt_args,
        )
        self._scheduled_lr = given.lr
        if given.sched == "none":
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def _schedule(self, optimizer: Any) -> Any:
        given = self.hparams
        # The length of an epoch is not known earlier.
        self.trainer.fit_loop.setup_data()
        batches, updates = self.trainer.num_training_batches, self.trainer.estimated_stepping_batches
        if math.isinf(batches) or math.isinf(updates):
            raise ConfigError(
                "A schedule needs the length of training: set trainer.max_epochs or trainer.max_steps, and for a "
                "stream of unknown length trainer.limit_train_batches; or set model.sched to none."
            )
        updates_per_epoch = math.ceil(batches / self.trainer.accumulate_grad_batches)
        scheduler, _ = _make(
            "model.sched_args",
            create_scheduler_v2,
            optimizer,
            sched=given.sched,
            num_epochs=updates / updates_per_epoch,
            warmup_epochs=given.warmup_epochs,
            min_lr=given.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **(given.sched_args or {}),
        )
        return scheduler

    def on_train_start(self) -> None:
        """Rebuild the schedule if Lightning's LearningRateFinder has set another peak learning rate."""
        lr = self.hparams.lr
        if lr == self._scheduled_lr:
            return
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = lr
            config.scheduler = self._schedule(optimizer)
            config.scheduler.step_update(num_updates=self.trainer.global_step)
        self._scheduled_lr = lr

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Pass the number of updates to timm's schedules; callbacks replace them by torch's schedulers."""
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(num_updates=self.trainer.global_step)
        else:
            super().lr_scheduler_step(scheduler, metric)


def _make(setting: str, factory: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a factory of timm; an error names the rejected setting."""
    try:
        return factory(*args, **kwargs)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"timm does not accept the settings of {setting}: {shorten(error, 200)}.") from error
