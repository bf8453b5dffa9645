"""A weight file becomes a ready model: `visionattn.load(FILE)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from visionattn import models, weights
from visionattn.errors import CheckpointError, ConfigError, UnknownNameError
from visionattn.weights import cca, match_stereo, span

__all__ = ["create", "load"]


def create(name: str, **model_args: Any) -> nn.Module:
    """`timm.create_model` with errors in plain words.

    Raises:
        UnknownNameError: No model has that name; the nearest names are suggested.
        ConfigError: The model does not take one of the arguments.
        CheckpointError: Its weights could not be downloaded.
    """
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        nearest = models.suggest(name)
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "`visionattn list` shows the names."
        raise UnknownNameError(f"There is no model {name!r}. {hint}")
    try:
        return timm.create_model(name, **model_args)
    except TypeError as error:
        raise ConfigError(f"The model {name!r} does not take one of these arguments: {error}") from error
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointError(f"The weights of {name!r} could not be downloaded: {reason}.") from error


def load(path: str | Path, name: str | None = None, **model_args: Any) -> nn.Module:
    """Make the model that a weight file belongs to, with its weights, ready for inference.

    Args:
        path: A checkpoint of `visionattn fit`, a file of bare weights (safetensors, or a pickle, wrapped as training
            code wraps it or not, in our layout or, of the families SPAN and MatchStereo, a published one), either file
            of ncnn's pair .param and .bin, or a folder written by timm's `save_for_hf`.
        name: Model name, where the file does not say it and its shapes fit several. The authors' MatchFlow files need
            it: they look like those of MatchStereo, as which they are read without it.
        **model_args: Arguments of the model that neither file nor name gives.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        CheckpointError: The file is unreadable, or fits no model or not the named one; the first mismatches are named.
        UnknownNameError: No model has that name.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"The folder {path} holds no config.json, so it was not written by save_for_hf.")
        return create(f"local-dir:{path}", pretrained=True, **model_args).eval()
    ncnn = path.with_suffix(".param").is_file() and path.suffix in (".param", ".bin")
    content: dict[str, Any] = dict(span.read_ncnn(path)) if ncnn else weights.read(path)
    hyper_parameters = content.get("hyper_parameters")
    if hyper_parameters:
        # A task can train more than its network, such as a decoder that is thrown away.
        content = {key: value for key, value in content["state_dict"].items() if key.startswith("net.")}
    state = weights.unwrap(content)
    model_args = {**cca.settings(state), **model_args}
    if name is None and hyper_parameters:
        name, settings = _from_training(hyper_parameters)
        model_args = {**settings, **model_args}
    published = None if hyper_parameters else span.identify(state) or match_stereo.identify(state, name)
    if name is None:
        name, settings = published or _identify(path, state)
        model_args = {**settings, **model_args}
    elif published and published[0] == name:
        model_args = {**published[1], **model_args}
    model = create(name, **model_args)
    for family in (span, match_stereo):
        state = dict(family.adapt(state, model.state_dict()))
    wrong = weights.mismatches(state, model.state_dict())
    if wrong:
        raise CheckpointError(_misfit(path, name, wrong))
    model.load_state_dict(state)
    return model.eval()


def _from_training(hyper_parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments that `visionattn fit` wrote beside the weights."""
    settings = dict(hyper_parameters.get("model_args") or {})
    # Branches serve training; the fused form reads them. Weights that a training started from are not looked for again.
    for key in ("branches", "pretrained_backbone", "backbone_checkpoint"):
        settings.pop(key, None)
    for key in ("num_classes", "in_chans"):
        if hyper_parameters.get(key) is not None:
            settings[key] = hyper_parameters[key]
    return hyper_parameters["name"], settings


def _misfit(path: Path, name: str, wrong: list[str]) -> str:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{path} does not fit {name}: {'; '.join(wrong[:3])}{more}."


def _identify(path: Path, state: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Find the one name of the zoo whose keys and shapes are those of `state`, whatever its classes and channels."""
    fitting, nearest = [], []
    names = models.names()
    # To build every name takes many seconds; a family shares the key of its first convolution.
    cards: dict[str, Any] = {name: timm.get_pretrained_cfg(name) for name in names}
    likely = [name for name in names if f"{cards[name].first_conv}.weight" in state]
    for name in likely or names:
        settings = _adaptation(name, state)
        try:
            with torch.device("meta"):
                wanted = timm.create_model(name, **settings).state_dict()
        except (RuntimeError, ValueError):  # such a number of classes or channels cannot be built
            continue
        wrong = weights.mismatches(state, wanted)
        nearest.append((len(wrong), name, wrong))
        if not wrong:
            fitting.append((name, settings))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        choice = ", ".join(name for name, _ in fitting)
        raise CheckpointError(f"{path} fits several models: {choice}. Say which: visionattn.load(FILE, name=...).")
    _, name, wrong = min(nearest)
    raise CheckpointError(f"{path} fits no model of this package. Nearest: {_misfit(path, name, wrong)}")


def _adaptation(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments that make classes and image channels those of the file."""
    config: Any = timm.get_pretrained_cfg(name)
    settings = cca.settings(state)
    head = state.get(f"{config.classifier}.weight")
    if config.num_classes >= 0:
        settings["num_classes"] = 0 if head is None else head.shape[0]
    stem = state.get(f"{config.first_conv}.weight")
    if stem is not None:
        settings["in_chans"] = stem.shape[1]
    return settings
