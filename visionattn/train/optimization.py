"""Optimizers and schedules of all tasks: timm's, the schedule stepped each update."""

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
"""Arguments that a task which has them gets from the data module: argument -> attribute of the data module."""


class OptimizedTask(LightningModule):
    """A task whose network is `net`, and how it is optimized.

    A task takes these settings behind its own, as `**optimization`, and names those whose default it changes.

    Args:
        opt: Name of the optimizer, one of `timm.optim.list_optimizers()`.
        lr: Peak learning rate.
        weight_decay: Weight decay; norms, biases and what the model exempts have none.
        opt_args: Further arguments of the optimizer, such as `betas`.
        sched: Schedule, stepped each update: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant or none.
        warmup_epochs: Epochs of linear warm-up, part of the whole.
        min_lr: Learning rate at the end.
        sched_args: Further arguments of timm's `create_scheduler_v2`; halving at epochs 50 and 80 is sched multistep
            with `{decay_milestones: [50, 80], decay_rate: 0.5}`.
        channels_last: Keep maps in memory with their channels side by side, which convolutions on GPUs prefer.
        compile: Compile the model.

    Raises:
        ConfigError: There is no such optimizer or schedule, or a number is out of range.
    """

    hparams: Any
    trainer: Any
    net: nn.Module
    monitor: ClassVar[str] = "val/accuracy"
    """The measure whose highest value makes the best checkpoint."""
    prediction_columns: ClassVar[tuple[str, ...]] = ()
    """What a prediction says of an image, a column each; empty where `visionattn predict` writes no file."""
    told: ClassVar[dict[str, str]] = {"name": "the model {!r}"}
    """Hyper-parameters that a checkpoint must share with the task, and how messages tell their values."""

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
        self.save_hyperparameters()  # those of the task too: Lightning reads the frames of all constructors
        self.check_names()

    def check_names(self) -> None:
        """Refuse names that timm would only refuse when training begins.

        Raises:
            ConfigError: There is no such schedule or optimizer; near names are suggested.
        """
        sched, opt, name = self.hparams.sched, self.hparams.opt, self.hparams.get("name")
        if isinstance(name, str) and not timm.is_model(name.split(".")[0]) and is_file(name):
            raise ConfigError(
                f"model.name must be a name, got the file {shorten(name)}: name the model that its weights are of, and "
                f"give the file by --model.model_args.checkpoint_path {shorten(name)}."
            )
        for name in ("lr", "weight_decay", "warmup_epochs", "min_lr"):
            if not 0 <= self.hparams[name] < math.inf:
                raise ConfigError(f"model.{name} must be a finite number, 0 or more; got {self.hparams[name]}.")
        if sched not in SCHEDULES:
            raise ConfigError(f"There is no schedule {sched!r}. Choose from {', '.join(SCHEDULES)}.")
        if opt.lower() not in timm.optim.list_optimizers():
            known = [str(known) for known in timm.optim.list_optimizers()]
            nearest = difflib.get_close_matches(opt, known, cutoff=0.4)
            raise ConfigError(f"There is no optimizer {opt!r}. Near it: {', '.join(nearest) or 'none'}.")

    @property
    def starts_trained(self) -> bool:
        """Whether the network began with weights that somebody trained."""
        # A task without `pretrained` does not ask.
        return self.hparams.get("pretrained", True) or "checkpoint_path" in (self.hparams.get("model_args") or {})

    def for_use(self) -> nn.Module:
        """The network as it is used after training."""
        return self.net

    def prediction_rows(self, output: Any, class_names: list[str] | None) -> Iterator[list[Any]]:
        """The values of `prediction_columns` for each image of a batch, from what `predict_step` gave."""
        raise NotImplementedError

    @property
    def trained(self) -> nn.Module:
        """What the optimizer trains: the network."""
        return self.net

    @property
    def parameter_groups(self) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
        """Groups of the trained parameters with rates of their own, in `lr_scale`; None for timm's groups."""
        return None

    @property
    def compiled(self) -> list[nn.Module]:
        """The modules that `compile` compiles: the network."""
        return [self.net]

    def setup(self, stage: str) -> None:
        """Order the network's memory, and compile."""
        if self.hparams.channels_last:
            self.net.to(memory_format=torch.channels_last)  # a convolution's output has the order of its weights
        if self.hparams.compile:
            for module in self.compiled:
                # In place: torch.compile(module) would put its own prefix before every key of the checkpoint.
                module.compile()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Log the learning rate, the highest of all layers."""
        # Lightning's LearningRateMonitor has a column for each group of parameters, and needs a logger.
        self.log("train/lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the network needs to be used (`visionattn.card`): how it is built, its images and its classes."""
        data = getattr(self.trainer, "datamodule", None)
        config = {**getattr(data, "image_config", {}), "label_names": getattr(data, "class_names", None)}
        card = Card.of(self.net, config, self.hparams.get("attributes"))
        if card is not None:
            checkpoint[KEY] = card.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or with weights that are no numbers, before torch lists its keys."""
        saved = checkpoint.get("hyper_parameters")
        self.check_checkpoint(saved if isinstance(saved, dict) else {})
        state = checkpoint["state_dict"]
        if wrong := weights.mismatches(state, self.state_dict()):
            raise CheckpointError(
                f"The checkpoint does not fit the model {self.hparams.name!r}: {weights.name_some(wrong)}. Were "
                "model.model_args others?"
            )
        weights.check_values(state, self.state_dict(), "The checkpoint")
        if self._trainer is not None and self._trainer.state.fn != TrainerFn.FITTING:
            # Only training goes on with them.
            for key in ("loops", "callbacks"):
                checkpoint.pop(key, None)

    def check_checkpoint(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint whose hyper-parameters are those of another model.

        Raises:
            CheckpointError: They are.
        """
        own = {**self.hparams, "name": base_name(self.hparams.name)}
        saved = {**saved, "name": base_name(saved.get("name", own["name"]))}
        for key, words in self.told.items():
            if key in saved and saved[key] != own[key]:
                raise CheckpointError(
                    f"The checkpoint is of {shorten(words.format(saved[key]))}; asked for was {words.format(own[key])}."
                )

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule."""
        given = self.hparams
        opt_args = dict(given.opt_args or {})
        if given.opt in ("adam", "adamw") and self.device.type == "cpu":
            opt_args.setdefault("fused", True)  # PyTorch's choice on a CPU goes through the parameters one by one
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
        # The length of an epoch is not known before.
        self.trainer.fit_loop.setup_data()
        batches, updates = self.trainer.num_training_batches, self.trainer.estimated_stepping_batches
        if math.isinf(batches) or math.isinf(updates):
            raise ConfigError(
                "A schedule must know where training ends: set trainer.max_epochs or trainer.max_steps, and for a "
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
        """Schedule another peak learning rate where Lightning's LearningRateFinder has set one."""
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
        """Timm's schedules are told the number of updates; callbacks put torch's schedulers in their place."""
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(num_updates=self.trainer.global_step)
        else:
            super().lr_scheduler_step(scheduler, metric)


def _make(setting: str, factory: Any, *args: Any, **kwargs: Any) -> Any:
    """What a factory of timm makes, or which setting it refuses."""
    try:
        return factory(*args, **kwargs)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"timm does not accept the settings of {setting}: {shorten(error, 200)}.") from error
