"""Finding the model of bare weights among all of this package, by their keys and shapes."""

from __future__ import annotations

from typing import Any

import timm
import torch

from visionattn import models
from visionattn.checkpoints.building import bounded
from visionattn.checkpoints.weight_file import WeightFile
from visionattn.errors import CheckpointError, shorten
from visionattn.weights.comparing import mismatches, name_some

__all__ = ["find_by_shapes"]

HEAD = {"pooling", "norm", "classifier", "queries", "value"}
"""First parts of the keys of a saved head: pooling, batch norm and classifier, or a segmenter."""


def find_by_shapes(file: WeightFile, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find the one name whose keys and shapes are those of a file, whatever its classes and channels.

    Args:
        file: The file.
        args: Arguments of the model that are known.

    Returns:
        Name and arguments.

    Raises:
        CheckpointError: The weights fit none, or several.
    """
    if {key.split(".")[0] for key in file.state} <= HEAD:
        raise CheckpointError(
            f"{shorten(file.path)} is a head of `visionattn probe`, without its backbone: use it by "
            "`visionattn predict IMAGES --head FILE` or `visionattn export --head FILE --output F.onnx`."
        )
    fitting, nearest = [], []
    # Without a mixer, va_vit_* have the shapes of minimal ViTs.
    names = [name for name in models.names() if not name.startswith("va_vit_")]
    # Building every model takes many seconds; a family shares the key of its first convolution.
    cards: dict[str, Any] = {name: timm.get_pretrained_cfg(name) for name in names}
    likely = [name for name in names if f"{cards[name].first_conv}.weight" in file.state]
    for name in likely or names:
        settings = {**args, **_adaptation(cards[name], file)}
        try:
            with torch.device("meta"), bounded(file, name):
                wanted = timm.create_model(name, **settings).state_dict()
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # cannot be built with this number of classes or channels
        wrong = mismatches(file.state, wanted)
        nearest.append((len(wrong), name, wrong))
        if not wrong:
            fitting.append((name, settings))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        choice = ", ".join(name for name, _ in fitting)
        raise CheckpointError(
            f"{shorten(file.path)} fits several models: {choice}. Choose one: visionattn.load(FILE, name=...)."
        )
    if not nearest:
        raise CheckpointError(f"{shorten(file.path)} fits no model of this package.")
    _, name, wrong = min(nearest)
    raise CheckpointError(
        f"{shorten(file.path)} fits no model of this package. Nearest: it does not fit {name}: {name_some(wrong)}. "
        "For a model of timm, give its name."
    )


def _adaptation(config: Any, file: WeightFile) -> dict[str, Any]:
    """Arguments that set classes and image channels to those of the file."""
    settings: dict[str, Any] = {}
    head = file.state.get(f"{config.classifier}.weight")
    if config.num_classes >= 0:
        settings["num_classes"] = 0 if head is None or not head.ndim else head.shape[0]
    stem = file.state.get(f"{config.first_conv}.weight")
    if stem is not None and stem.ndim > 1:
        settings["in_chans"] = stem.shape[1]
    return settings
