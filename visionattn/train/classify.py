"""Training a classifier: any model of timm's registry, timm's optimizers, schedules and mixing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_model_data_config
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from visionattn.data.samplers import IGNORED
from visionattn.errors import ConfigError, InputError
from visionattn.train.announce import say
from visionattn.train.finetune import (
    classifier_parameters,
    create_to_tune,
    frozen_by_stage,
    hold_statistics,
    judge_frozen,
    names_file,
    of_file,
    start_linear,
    weights_of_classes,
)
from visionattn.train.frozen import FrozenBackbone
from visionattn.train.optimization import OptimizedTask
from visionattn.train.results import Judgements

__all__ = ["ClassifyTask"]


class ClassifyTask(OptimizedTask):
    """A classifier and how it is trained.

    Args:
        name: Name of the model in timm's registry.
        model_args: Further arguments of the model, such as `drop_path_rate` or `img_size`.
        num_classes: Number of classes.
        in_chans: Channels of the images; None takes the model's own.
        pretrained: Begin with the published weights.
        checkpoint: Begin with the weights of a file, its classifier left out, in place of the published ones.
        freeze: Number of stages that do not train, the stem counting as the first; -1 for all but the classifier.
        freeze_norms: Keep the running statistics of batch norms, which small batches would disturb.
        head_epochs: Epochs at the beginning in which the classifier alone trains.
        linear_start: Begin with the linear classifier that is trained on the frozen backbone, not with a random one.
        layer_decay: Factor by which the learning rate falls from each layer to the one below; None for one rate.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weigh the loss of each class inversely to its number of training images.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        grad_checkpointing: Compute activations again in the backward pass instead of keeping them.
        report: Measure the frozen backbone before training, and write a report into the run's folder after it.
        **optimization: Those of `OptimizedTask`.
    """

    prediction_columns = ("label", "class", "probability")
    told: ClassVar[dict[str, str]] = {
        **OptimizedTask.told,
        "num_classes": "{} classes",
        "in_chans": "in_chans = {}",
    }

    def __init__(
        self,
        name: str = "va_minimal_vit_nano_patch7_28",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_chans: int | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        freeze: int = 0,
        freeze_norms: bool = False,
        head_epochs: int = 0,
        linear_start: bool = False,
        layer_decay: float | None = None,
        label_smoothing: float = 0.0,
        class_weights: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        grad_checkpointing: bool = False,
        report: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        name, model_args, checkpoint = (self.hparams[key] for key in ("name", "model_args", "checkpoint"))
        if min(mixup, cutmix) < 0 or not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"model.mixup and model.cutmix must be 0 or more, model.label_smoothing from 0 to below 1; got "
                f"{mixup}, {cutmix} and {label_smoothing}."
            )
        if freeze < -1 or head_epochs < 0:
            raise ConfigError(
                f"model.freeze must be -1 or more, model.head_epochs 0 or more; got {freeze} and {head_epochs}."
            )
        settings = {**({} if in_chans is None else {"in_chans": in_chans}), **(model_args or {})}
        self.net = create_to_tune(name, pretrained, checkpoint, num_classes=num_classes, **settings)
        self._frozen = frozen_by_stage(self.net, freeze)
        self._head = classifier_parameters(self.net) if head_epochs or linear_start else set()
        self._train_only(set())
        if grad_checkpointing:
            try:
                self.net.set_grad_checkpointing(True)  # type: ignore[operator]
            except (AttributeError, AssertionError) as error:
                raise ConfigError(f"The model {name!r} has no gradient checkpointing.") from error
        self.judgements = Judgements()
        self.frozen: FrozenBackbone | None = None
        self._class_weights: torch.Tensor | None = None
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        self.val_metrics = self._metrics("val/", num_classes)
        self.test_metrics = self._metrics("test/", num_classes)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def check_names(self) -> None:
        """Replace a file as `model.name` by the model that it says; the command's hyperparameters are as typed."""
        given = self.hparams
        if names_file(given.name):
            found = of_file(given.name, given.model_args, given.checkpoint)
            given.update(zip(("name", "model_args", "checkpoint"), found))
        super().check_names()

    def _train_only(self, names: set[str]) -> None:
        """Let parameters of these names train, or all for no name; those that `freeze` names never do."""
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name not in self._frozen and (not names or name in names))

    @staticmethod
    def _metrics(prefix: str, num_classes: int) -> MetricCollection:
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, norm="l1"),
        }
        if num_classes > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        # Compute groups would share the states of metrics that differ in top_k only.
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    @property
    def data_config(self) -> dict[str, Any]:
        """What images the model expects: input_size, mean, std, interpolation, crop_pct."""
        return resolve_model_data_config(self.net)

    def setup(self, stage: str) -> None:
        """Check that model and data fit, and compile."""
        datamodule = self.trainer.datamodule
        shape = getattr(datamodule, "image_shape", None) or self.data_config["input_size"]
        if self.mix is not None and stage == "fit" and getattr(datamodule, "hparams", {}).get("batch_size", 2) % 2:
            raise ConfigError("mixup and cutmix mix pairs of images: set data.batch_size to an even number.")
        if stage == "fit" and self.hparams.class_weights and getattr(datamodule, "hparams", {}).get("balanced"):
            raise ConfigError("data.balanced and model.class_weights both even out the classes: set one of them.")
        unused = getattr(self.trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters")
        if stage == "fit" and self.hparams.head_epochs and self.trainer.world_size > 1 and not unused:
            raise ConfigError(
                "model.head_epochs leaves parameters without gradients for a while: on several devices set "
                "trainer.strategy to ddp_find_unused_parameters_true."
            )
        self._check_input(shape)
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Measure the frozen backbone, unless the training is resumed."""
        data, given = self.trainer.datamodule, self.hparams
        if given.class_weights:
            self._class_weights = weights_of_classes(data).to(self.device)
        if self.trainer.ckpt_path or self.trainer.fast_dev_run:
            return
        if given.checkpoint is not None:
            classes = f"a new one tells {given.num_classes} classes"
            say(self.trainer, f"weights of {given.checkpoint}, its classifier left out: {classes}")
        if not (given.report or given.linear_start):
            return
        self.frozen = judge_frozen(self.net, data)
        say(self.trainer, str(self.frozen))
        if given.linear_start:
            start_linear(self.net, self.frozen)

    def on_train_epoch_start(self) -> None:
        """Freeze what does not train in this epoch."""
        head_only = self.current_epoch < self.hparams.head_epochs
        self._train_only(self._head if head_only else set())
        self.net.train()
        hold_statistics(self.net, every=self.hparams.freeze_norms)

    def _check_input(self, shape: tuple[int, int, int]) -> None:
        parameter = next(self.net.parameters())
        training = self.net.training
        try:
            with torch.no_grad():
                self.net.eval()(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            channels, height, width = shape
            size = f"{height} x {width} images of {channels} channels"
            raise InputError(f"The model {self.hparams.name!r} does not take {size}: {error}") from error
        finally:
            self.net.train(training)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return self.net(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one batch."""
        images, targets = batch
        label_smoothing = self.hparams.label_smoothing
        if self.mix is not None:
            images, targets = self.mix(images, targets)
            label_smoothing = 0.0  # mixed targets are smooth
        loss = self.training_loss(images, targets, label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def training_loss(self, images: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Images (B, C, H, W) and labels (B,) or probabilities (B, num_classes) -> the loss, ()."""
        weight = self._class_weights
        return F.cross_entropy(self(images), targets, weight=weight, label_smoothing=label_smoothing)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Metrics of the validation part."""
        self._evaluate(batch, self.val_metrics, self.val_loss)
        self.log("val/loss", self.val_loss)
        for key, metric in self.val_metrics.items():
            self.log(key, metric, prog_bar=key == "val/accuracy")

    def on_test_epoch_start(self) -> None:
        """Forget what an earlier test collected."""
        self.judgements.clear()

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Metrics of the test part."""
        probabilities = self._evaluate(batch, self.test_metrics, self.test_loss)
        self.judgements.update(probabilities, batch[1])
        self.log("test/loss", self.test_loss)
        self.log_dict(self.test_metrics)

    def _evaluate(self, batch: tuple[torch.Tensor, torch.Tensor], metrics: Any, mean_loss: Any) -> torch.Tensor:
        images, labels = batch
        every = logits = self(images).float()
        kept = labels != IGNORED
        logits, labels = logits[kept], labels[kept]
        if len(labels):
            mean_loss.update(F.cross_entropy(logits, labels, reduction="none"))
            metrics.update(logits.softmax(dim=-1), labels)
        return every.softmax(dim=-1)

    def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        """Probability of each class, and the likeliest class."""
        probabilities = self(batch[0]).float().softmax(dim=-1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(dim=-1)}

    def prediction_rows(self, output: dict[str, torch.Tensor], class_names: list[str] | None) -> Iterator[list[Any]]:
        """Number, name and probability of each image's likeliest class."""
        for probabilities, label in zip(output["probabilities"], output["labels"].tolist()):
            shown = class_names[label] if class_names and label < len(class_names) else label
            yield [label, shown, f"{probabilities[label].item():.6f}"]
