"""Training super-resolution: a model of the task "restore", with or without a teacher.

    out = net(small / 255)
    L = (1 - w) l(out, large / 255) + w l(out, teacher(small / 255))      w = 0 without a teacher
    l = mean sqrt(d^2 + eps^2)  (Charbonnier)   or   mean |d|  (l1)       d is the difference of a colour value

Validation computes PSNR as the benchmarks do (`visionattn.metrics.luma`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torchmetrics import MeanMetric

from visionattn.checkpoints import create, load
from visionattn.data.samplers import IGNORED
from visionattn.errors import ConfigError
from visionattn.metrics.luma import psnr_y, to_uint8
from visionattn.train.optimization import OptimizedTask

__all__ = ["RestoreTask"]

LOSSES = ("charbonnier", "l1")


class RestoreTask(OptimizedTask):
    """A super-resolution model and its training.

    Args:
        name: Name of the model in timm's registry; it takes RGB in 0..1 and has a `scale`.
        model_args: Further arguments of the model. For SPAN, `branches: true` trains each convolution as several
            branches; they are fused for evaluation, and `visionattn.load` fuses the checkpoint.
        pretrained: Start from the published weights.
        loss: charbonnier or l1.
        eps: Where Charbonnier's loss changes from quadratic to linear, in units of the 0..1 range.
        teacher: Checkpoint of a model of the same scale, read by `visionattn.load`, whose output is a second target.
        teacher_weight: Weight w of the teacher in the loss, above 0, at most 1.
        **optimization: Arguments of `OptimizedTask`.
    """

    monitor = "val/psnr_y"

    def __init__(
        self,
        name: str = "va_span_ch26_x4",
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        loss: str = "charbonnier",
        eps: float = 1e-3,
        teacher: str | None = None,
        teacher_weight: float = 0.5,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        min_lr: float = 1e-7,
        **optimization: Any,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, min_lr=min_lr, **optimization)
        if loss not in LOSSES:
            raise ConfigError(f"model.loss must be one of {', '.join(map(repr, LOSSES))}; got {loss!r}.")
        if not 0 < teacher_weight <= 1:
            raise ConfigError(f"model.teacher_weight must be above 0 and at most 1; got {teacher_weight}.")
        self.net = create(name, pretrained=pretrained, **(model_args or {}))
        net: Any = self.net
        if getattr(net, "task", None) != "restore" or net.in_chans != 3:
            raise ConfigError(f"model.name must be a model of the task 'restore' for colour images; got {name!r}.")
        self.scale: int = net.scale
        # In tuples, torch does not register the networks, neither for the checkpoint nor for the optimizer.
        self._teacher: tuple[torch.nn.Module, ...] = ()
        self._measured: tuple[torch.nn.Module, ...] = ()
        self.val_psnr, self.test_psnr = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Load the teacher too."""
        super().setup(stage)
        given = self.hparams
        if stage == "fit" and given.teacher is not None and not self._teacher:
            teacher: Any = load(Path(given.teacher))
            if getattr(teacher, "scale", None) != self.scale:
                raise ConfigError(
                    f"The teacher {given.teacher} upscales {getattr(teacher, 'scale', None)} times, the model "
                    f"{self.scale} times."
                )
            self._teacher = (teacher.requires_grad_(False),)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """RGB in 0..1, (B, 3, H, W) -> (B, 3, rH, rW), not clamped."""
        return self.net(images)

    def on_fit_start(self) -> None:
        """Move the teacher to the device."""
        for teacher in self._teacher:
            teacher.to(self.device)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one batch."""
        images, targets = batch[0] / 255, batch[1] / 255
        found = self(images).float()
        loss = self._distance(found, targets)
        for teacher in self._teacher:
            with torch.no_grad():
                taught = teacher(images).float()
            share = self.hparams.teacher_weight
            loss = (1 - share) * loss + share * self._distance(found, taught)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _distance(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        difference = found - wanted
        if self.hparams.loss == "l1":
            return difference.abs().mean()
        return (difference.square() + self.hparams.eps**2).sqrt().mean()

    def on_validation_epoch_start(self) -> None:
        """Fuse a copy for evaluation."""
        self._measured = (self.for_use(),)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """PSNR of the validation images."""
        self._measure(batch, self.val_psnr)
        self.log("val/psnr_y", self.val_psnr, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Release the copy."""
        self._measured = ()

    def on_test_epoch_start(self) -> None:
        """Fuse a copy for evaluation."""
        self._measured = (self.for_use(),)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """PSNR of the test images."""
        self._measure(batch, self.test_psnr)
        self.log("test/psnr_y", self.test_psnr)

    def on_test_epoch_end(self) -> None:
        """Release the copy."""
        self._measured = ()

    def for_use(self) -> torch.nn.Module:
        """A fused copy of a network that can be fused, else the network itself."""
        net: Any = self.net
        return copy.deepcopy(net).fuse() if hasattr(net, "fuse") else net

    def _measure(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mean: MeanMetric) -> None:
        small, large, numbers = batch
        (net,) = self._measured
        for image, target, found in zip(numbers.tolist(), large, net(small / 255)):
            if image != IGNORED:
                mean.update(psnr_y(to_uint8(found), target.permute(1, 2, 0).cpu().numpy(), self.scale))
