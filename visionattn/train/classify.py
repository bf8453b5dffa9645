"""Training a classifier: any model of timm's registry, with timm's optimizers, schedules and mixing."""

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
    """A classifier and its training.

    Args:
        name: Name of the model in timm's registry.
        model_args: Further arguments of the model, such as `drop_path_rate` or `img_size`.
        num_classes: Number of classes.
        in_chans: Channels of the images; None uses the model's default.
        pretrained: Start from the published weights.
        checkpoint: Start from the weights in a file, without their classifier, instead of the published ones.
        freeze: Number of frozen stages, the stem counting as the first; -1 freezes all but the classifier.
        freeze_norms: Keep the running statistics of batch norms, which small batches would degrade.
        head_epochs: Number of first epochs in which only the classifier trains.
        linear_start: Start from a linear classifier trained on the frozen backbone instead of a random one.
        layer_decay: Factor of the learning rate from each layer to the one below; None for a uniform rate.
        label_smoothing: Fraction of the target that is spread over all classes.
        class_weights: Weight the loss of each class inversely to its number of training images.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        grad_checkpointing: Recompute activations in the backward pass instead of keeping them.
        report: Evaluate the frozen backbone before training, and write a report into the run's folder afterwards.
        **optimization: Arguments of `OptimizedTask`.
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
                f"model.mixup and model.cutmix must be at least 0, model.label_smoothing at least 0 and below 1; got "
                f"{mixup}, {cutmix} and {label_smoothing}."
            )
        if freeze < -1 or head_epochs < 0:
            raise ConfigError(
                f"model.freeze must be at least -1, model.head_epochs at least 0; got {freeze} and {head_epochs}."
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
                raise ConfigError(f"The model {name!r} does not support gradient checkpointing.") from error
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
        """Resolve a file given as `model.name` to its model; the saved hyperparameters stay as given."""
        given = self.hparams
        if names_file(given.name):
            found = of_file(given.name, given.model_args, given.checkpoint)
            given.update(zip(("name", "model_args", "checkpoint"), found))
        super().check_names()

    def _train_only(self, names: set[str]) -> None:
        """Let only parameters of these names train, or all for an empty set, except those frozen by `freeze`."""
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
        # Compute groups would share the states of metrics that differ only in top_k.
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    @property
    def data_config(self) -> dict[str, Any]:
        """Input configuration of the model: input_size, mean, std, interpolation, crop_pct."""
        return resolve_model_data_config(self.net)

    def setup(self, stage: str) -> None:
        """Check that model and data match, and compile."""
        datamodule = self.trainer.datamodule
        shape = getattr(datamodule, "image_shape", None) or self.data_config["input_size"]
        if self.mix is not None and stage == "fit" and getattr(datamodule, "hparams", {}).get("batch_size", 2) % 2:
            raise ConfigError("mixup and cutmix mix pairs of images: set data.batch_size to an even number.")
        if stage == "fit" and self.hparams.class_weights and getattr(datamodule, "hparams", {}).get("balanced"):
            raise ConfigError("data.balanced and model.class_weights both balance the classes: set only one of them.")
        unused = getattr(self.trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters")
        if stage == "fit" and self.hparams.head_epochs and self.trainer.world_size > 1 and not unused:
            raise ConfigError(
                "model.head_epochs leaves parameters without gradients in the first epochs: on several devices set "
                "trainer.strategy to ddp_find_unused_parameters_true."
            )
        self._check_input(shape)
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Evaluate the frozen backbone, unless the training is resumed."""
        data, given = self.trainer.datamodule, self.hparams
        if given.class_weights:
            self._class_weights = weights_of_classes(data).to(self.device)
        if self.trainer.ckpt_path or self.trainer.fast_dev_run:
            return
        if given.checkpoint is not None:
            classes = f"a new one has {given.num_classes} classes"
            say(self.trainer, f"weights of {given.checkpoint}, without their classifier: {classes}")
        if not (given.report or given.linear_start):
            return
        self.frozen = judge_frozen(self.net, data)
        say(self.trainer, str(self.frozen))
        if given.linear_start:
            start_linear(self.net, self.frozen)

    def on_train_epoch_start(self) -> None:
        """Freeze the parameters that do not train in this epoch."""
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
            raise InputError(f"The model {self.hparams.name!r} does not accept {size}: {error}") from error
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
            label_smoothing = 0.0  # mixed targets are already smooth
        loss = self.training_loss(images, targets, label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def training_loss(self, images: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Images (B, C, H, W) and labels (B,) or probabilities (B, num_classes) -> the loss, ()."""
        weight = self._class_weights
        return F.cross_entropy(self(images), targets, weight=weight, label_smoothing=label_smoothing)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Metrics of the validation split."""
        self._evaluate(batch, self.val_metrics, self.val_loss)
        self.log("val/loss", self.val_loss)
        for key, metric in self.val_metrics.items():
            self.log(key, metric, prog_bar=key == "val/accuracy")

    def on_test_epoch_start(self) -> None:
        """Discard the results of an earlier test."""
        self.judgements.clear()

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Metrics of the test split."""
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
        """Probability of each class, and the most likely class."""
        probabilities = self(batch[0]).float().softmax(dim=-1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(dim=-1)}

    def prediction_rows(self, output: dict[str, torch.Tensor], class_names: list[str] | None) -> Iterator[list[Any]]:
        """Index, name and probability of the most likely class of each image."""
        for probabilities, label in zip(output["probabilities"], output["labels"].tolist()):
            shown = class_names[label] if class_names and label < len(class_names) else label
            yield [label, shown, f"{probabilities[label].item():.6f}"]
