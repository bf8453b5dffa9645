"""Models of torchvision as backbones: opening them by name, and their stages as layers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visionattn.adapters.base import AdaptedModel
from visionattn.checkpoints.weight_file import load_weights
from visionattn.errors import CheckpointError, InputError, UnknownNameError, shorten

__all__ = ["CLASSIFIERS", "TORCHVISION", "TorchvisionModel", "open_torchvision"]

TORCHVISION = "torchvision/"
"""Prefix of the names of torchvision's models."""

CLASSIFIERS = ("fc", "classifier", "heads", "head")
"""Names of the last layers of torchvision's classifiers."""


def open_torchvision(
    name: str, checkpoint: str | Path | None, random: bool, image_size: int | tuple[int, int] | None
) -> TorchvisionModel:
    """Build a torchvision classifier without its last linear layers.

    Args:
        name: `torchvision/NAME`.
        checkpoint: Weight file, with or without a classifier; nothing is downloaded.
        random: Random weights, always the same.
        image_size: Side, or height and width, that a ViT is built for.

    Raises:
        CheckpointError: The weights could not be read or do not fit; or both or none of the two sources are given.
        UnknownNameError: The model is unknown.
    """
    from torchvision import models

    name = name.removeprefix(TORCHVISION)
    if name not in models.list_models(models):
        near = difflib.get_close_matches(name, models.list_models(models), 3)
        hint = f" Did you mean {', '.join(TORCHVISION + one for one in near)}?" if near else ""
        raise UnknownNameError(f"There is no model {shorten(TORCHVISION + name)!r}.{hint}")
    if (checkpoint is not None) == random:
        given = "both" if random else "none"
        raise CheckpointError(
            f"{TORCHVISION}{name} needs --checkpoint FILE, since nothing is downloaded, or --random; got {given}."
        )
    options = {"image_size": image_size} if image_size and name.startswith("vit_") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: Any = models.get_model(name, weights=None, **options)
    for part in CLASSIFIERS:
        if hasattr(found, part):
            setattr(found, part, nn.Identity())
    if checkpoint is not None:
        found.pretrained_cfg = {"architecture": name, "classifier": CLASSIFIERS}
        load_weights(found, checkpoint, drop_classifier=True)
    return TorchvisionModel(found.eval())


class TorchvisionModel(AdaptedModel):
    """A torchvision classifier without its last linear layers.

    Layers are its stages; the last one is the input of its pooling, or for a ViT the tokens after the final norm, which
    is applied to its other layers too.

    Args:
        model: Such as `torchvision.models.resnet50()`. It is modified.
    """

    def __init__(self, model: nn.Module) -> None:
        net: Any = model
        self_attending = hasattr(model, "class_token") and hasattr(model, "encoder")
        size = net.image_size if self_attending else 224
        prefix = int(self_attending)
        name = type(model).__name__
        super().__init__(name, size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, prefix, self_attending)
        for part in CLASSIFIERS:
            if hasattr(model, part):
                setattr(model, part, nn.Identity())
        self.model = model
        self.norm = net.encoder.ln if self_attending else None
        self.channels_last = hasattr(model, "permute") and hasattr(model, "norm")  # Swin
        self.stages = [stage for stage, _ in self._find_stages()]
        self.feature_info = [{"module": stage} for stage in self.stages]

    def _find_stages(self) -> list[tuple[str, nn.Module]]:
        net: Any = self.model
        for part in ("encoder.layers", "trunk_output", "features", "blocks", "layers"):
            try:
                found = net.get_submodule(part)
            except AttributeError:
                continue
            return [(f"{part}.{name}", module) for name, module in found.named_children()]
        names = [name for name, _ in net.named_children() if name.startswith(("layer", "stage", "Mixed_", "inception"))]
        if not names:
            raise InputError(f"{type(net).__name__} of torchvision is not supported: it has no stages.")
        return [(name, getattr(net, name)) for name in names]

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """See `AdaptedModel.read`."""
        found: dict[str, Tensor] = {}
        with _watching(self.model, self.stages, found):
            self.model(images)
        layers = [found[name] for name in self.stages]
        if self.norm is not None:
            return [self.norm(layer) for layer in layers] if norm else layers
        if self.channels_last:
            layers = [layer.movedim(-1, 1) for layer in layers]
        return [*layers[:-1], found["pooled"]] if norm and "pooled" in found else layers


@contextmanager
def _watching(model: nn.Module, stages: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Record the outputs of stages and the input of the pooling, with temporary hooks, so that models can be copied."""

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, output)

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in stages]
    pooling = getattr(model, "avgpool", None)
    if isinstance(pooling, nn.Module):
        hooks.append(pooling.register_forward_pre_hook(lambda module, args: found.__setitem__("pooled", args[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
