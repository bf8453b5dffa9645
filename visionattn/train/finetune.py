"""Initial weights and trainable parameters of fine-tuning: pretrained models with a new classifier, frozen by stage.

Starting from the linear classifier of the frozen features, instead of a random one, keeps its first gradients from
distorting the features (Kumar et al., arXiv 2202.10054).
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from visionattn.checkpoints import HOSTED, classifier_keys, create, load, load_weights, read_card
from visionattn.errors import CheckpointError, ConfigError, shorten
from visionattn.train.frozen import FrozenBackbone, judge_vectors, read_vectors

__all__ = [
    "classifier_parameters",
    "create_to_tune",
    "frozen_by_stage",
    "hold_statistics",
    "judge_frozen",
    "names_file",
    "of_file",
    "start_linear",
    "weights_of_classes",
]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MOST_IMAGES = 10_000
"""Maximum number of training images for evaluating a frozen backbone; one vector per image is kept in memory."""


def names_file(name: Any) -> bool:
    """Whether `model.name` is a file rather than a model name."""
    if not isinstance(name, str) or name.startswith(HOSTED) or timm.is_model(name.split(".")[0]):
        return False
    return os.path.exists(name)


def of_file(path: str, model_args: dict[str, Any] | None, checkpoint: str | None) -> tuple[str, dict[str, Any], str]:
    """Name, arguments and weight file of a model whose `model.name` is a file.

    Raises:
        CheckpointError: The file does not identify its model, or cannot be read.
        ConfigError: Another weight file is given too.
    """
    if checkpoint is not None:
        raise ConfigError(f"model.name is the file {shorten(path)}: remove model.checkpoint, or give a model name.")
    if Path(path).is_dir():
        raise ConfigError(f"model.name is a folder: use local-dir:{shorten(path)} for a folder written by save_for_hf.")
    try:
        card = read_card(path)
        if card is not None:
            name, args = card.name, card.model_args
        else:
            model: Any = load(path)  # identifies models of this package by their weight shapes
            name, args = model.pretrained_cfg["architecture"], {}
    except CheckpointError as error:
        if not Path(path).is_file() or "For a model of timm" not in str(error):
            raise
        raise CheckpointError(
            f"{shorten(path)} does not identify its model: give the name by --model.name and the file by "
            f"--model.checkpoint {shorten(path)}."
        ) from error
    args = {key: value for key, value in args.items() if key not in ("num_classes", "in_chans")}
    return name, {**args, **(model_args or {})}, path


def create_to_tune(name: str, pretrained: bool, checkpoint: str | None, **model_args: Any) -> nn.Module:
    """A model with a new classifier and the weights of a file or the published ones.

    Raises:
        CheckpointError: The weights do not fit or are not available; the message says what to do.
        UnknownNameError: The model is unknown.
    """
    if checkpoint is not None:
        model = create(name, **model_args)
        load_weights(model, checkpoint, drop_classifier=True)
        return model
    try:
        return create(name, pretrained=pretrained, **model_args)
    except CheckpointError as error:
        if not pretrained or "could not be downloaded" not in str(error):
            raise
        raise CheckpointError(
            f"The published weights of {shorten(name)!r} are not on this machine and could not be downloaded: give a "
            "file by --model.checkpoint FILE, or --model.pretrained false to train from random weights."
        ) from error


def judge_frozen(net: nn.Module, data: Any) -> FrozenBackbone:
    """Evaluate a backbone on the validation split of a data module, with at most `MOST_IMAGES` images of each split.

    Raises:
        ConfigError: The data are a stream.
    """
    classes = data.class_names or [str(label) for label in range(data.num_classes)]
    train, val = (read_vectors(net, data.still_loader(split, MOST_IMAGES), classes) for split in ("train", "val"))
    return judge_vectors(train, val)


def start_linear(net: nn.Module, found: FrozenBackbone) -> None:
    """Initialise a model's classifier with the linear classifier of its frozen features.

    Raises:
        ConfigError: The model's classifier is not a single linear layer on these features.
    """
    model: Any = net
    classifier, weights = model.get_classifier(), found.weights
    if weights is None:
        return
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != weights[0].shape or classifier.bias is None:
        raise ConfigError(
            f"The classifier of {type(net).__name__} is not a single linear layer: set model.linear_start to false."
        )
    with torch.no_grad():
        classifier.weight.copy_(weights[0])
        classifier.bias.copy_(weights[1])


def weights_of_classes(data: Any) -> Tensor:
    """Loss weight of each class (K,), n / (K n_c), whose mean over the n training images is 1.

    Raises:
        ConfigError: The labels are not known without reading the images.
    """
    counts = Counter(data.training_labels())
    total, classes = counts.total(), data.num_classes
    return torch.tensor([total / (classes * counts[label]) if counts[label] else 0.0 for label in range(classes)])


def classifier_parameters(net: nn.Module) -> set[str]:
    """Names of the parameters of a model's classifier.

    Raises:
        ConfigError: The model does not identify its classifier.
    """
    heads = classifier_keys(net)
    found = {name for name, _ in net.named_parameters() if name.startswith(heads)} if heads else set()
    if not found:
        raise ConfigError(
            f"{type(net).__name__} does not identify its classifier layer: remove model.freeze, "
            "model.head_epochs and model.linear_start."
        )
    return found


def frozen_by_stage(net: nn.Module, stages: int) -> set[str]:
    """Names of the parameters of a model's first stages, as timm groups them: stem, stages or blocks, last layers.

    Args:
        net: A model of timm.
        stages: Number of stages, the stem counting as one; -1 for all but the classifier.

    Raises:
        ConfigError: The model has fewer stages, or does not name them.
    """
    if stages == 0:
        return set()
    head = classifier_parameters(net)
    if stages == -1:
        return {name for name, _ in net.named_parameters()} - head
    matcher = getattr(net, "group_matcher", None)
    if matcher is None:
        raise ConfigError(f"{type(net).__name__} does not name its stages: model.freeze must be 0 or -1.")
    grouped: Any = group_parameters(net, matcher(coarse=True))
    groups = [set(names) - head for _, names in sorted(grouped.items())]
    groups = [names for names in groups if names]
    if not 0 < stages < len(groups):
        raise ConfigError(
            f"model.freeze must be 0 to {len(groups) - 1} for {shorten(type(net).__name__)}, which has "
            f"{len(groups)} stages, or -1 for all but the classifier; got {stages}."
        )
    return set().union(*groups[:stages])


def hold_statistics(net: nn.Module, every: bool) -> None:
    """Keep the running statistics of all batch norms in training, or only of those with frozen parameters."""
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, BATCH_NORMS) and (every or (own and not any(weight.requires_grad for weight in own))):
            module.eval()
