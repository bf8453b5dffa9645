"""Optimizers and schedules of all tasks: timm's, the schedule stepped each update."""

from __future__ import annotations

import difflib
import math
from typing import Any

import timm.optim
from lightning.pytorch import LightningModule
from timm.scheduler import create_scheduler_v2
from torch import nn

from visionattn.card import KEY, Card
from visionattn.errors import ConfigError

__all__ = ["SCHEDULES", "OptimizedTask"]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")


class OptimizedTask(LightningModule):
    """A task whose network is `net` and whose hyper-parameters name its optimizer and schedule.

    They are opt, lr, weight_decay, opt_args, sched, warmup_epochs, min_lr, sched_args and, where a task has it,
    layer_decay, as `ClassifyTask` describes them.
    """

    hparams: Any
    trainer: Any
    net: nn.Module

    def check_names(self) -> None:
        """Refuse names that timm would only refuse when training begins.

        Raises:
            ConfigError: There is no such schedule or optimizer; near names are suggested.
        """
        sched, opt = self.hparams.sched, self.hparams.opt
        if sched not in SCHEDULES:
            raise ConfigError(f"There is no schedule {sched!r}. Choose from {', '.join(SCHEDULES)}.")
        if opt.lower() not in timm.optim.list_optimizers():
            known = [str(known) for known in timm.optim.list_optimizers()]
            nearest = difflib.get_close_matches(opt, known, cutoff=0.4)
            raise ConfigError(f"There is no optimizer {opt!r}. Near it: {', '.join(nearest) or 'none'}.")

    @property
    def trained(self) -> nn.Module:
        """What the optimizer trains: the network."""
        return self.net

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the network needs to be used (`visionattn.card`): how it is built, its images and its classes."""
        data = getattr(self.trainer, "datamodule", None)
        config = {**getattr(data, "image_config", {}), "label_names": getattr(data, "class_names", None)}
        card = Card.of(self.net, config, self.hparams.get("attributes"))
        if card is not None:
            checkpoint[KEY] = card.to_dict()

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule."""
        given = self.hparams
        optimizer = timm.optim.create_optimizer_v2(
            self.trained,
            opt=given.opt,
            lr=given.lr,
            weight_decay=given.weight_decay,
            layer_decay=given.get("layer_decay"),
            **(given.opt_args or {}),
        )
        if given.sched == "none":
            return optimizer
        # The length of an epoch is not known before.
        self.trainer.fit_loop.setup_data()
        batches, updates = self.trainer.num_training_batches, self.trainer.estimated_stepping_batches
        if math.isinf(batches) or math.isinf(updates):
            raise ConfigError(
                "A schedule must know where training ends: set trainer.max_epochs or trainer.max_steps, and for a "
                "stream of unknown length trainer.limit_train_batches; or set model.sched to none."
            )
        updates_per_epoch = math.ceil(batches / self.trainer.accumulate_grad_batches)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=given.sched,
            num_epochs=updates / updates_per_epoch,
            warmup_epochs=given.warmup_epochs,
            min_lr=given.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **(given.sched_args or {}),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Timm's schedules are told the number of updates."""
        scheduler.step_update(num_updates=self.trainer.global_step)
