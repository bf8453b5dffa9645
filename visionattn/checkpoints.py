"""Building a model from a weight file: `visionattn.load(FILE)`."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from visionattn import models, weights
from visionattn.card import Card, describe
from visionattn.errors import CheckpointError, ConfigError, UnknownNameError, VisionAttnError, shorten
from visionattn.hub import quick_when_offline
from visionattn.weights import cca, match_stereo, span

__all__ = ["HOSTED", "classifier_keys", "create", "create_pretrained", "load", "load_weights", "read_card"]

HOSTED = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of names that stand for weights instead of architectures."""


def create(
    name: str, *, pretrained: bool = False, checkpoint_path: str | Path | None = None, **model_args: Any
) -> nn.Module:
    """`timm.create_model` with one-line errors.

    The model's `pretrained_cfg` has the size and the channels that it was built for.

    Args:
        name: Name in timm's registry, or `hf-hub:REPOSITORY` or `local-dir:FOLDER`.
        pretrained: Load the published weights.
        checkpoint_path: Load the weights of a file, which must fit.
        **model_args: Further arguments of the model.

    Raises:
        UnknownNameError: No model has that name; the nearest names are suggested.
        ConfigError: The model cannot be built with the arguments.
        CheckpointError: Its weights could not be downloaded or read, or do not fit.
    """
    if not isinstance(name, str) or not name.startswith(HOSTED):
        _check_name(name)
    elif not name.partition(":")[2].strip():
        raise UnknownNameError(f"{name!r} names nothing: give {name}OWNER/NAME, or a folder for local-dir.")
    if checkpoint_path and not Path(checkpoint_path).is_file():
        raise CheckpointError(f"There is no file {shorten(checkpoint_path)}, which checkpoint_path names.")
    try:
        with quick_when_offline(name, pretrained):
            model = timm.create_model(name, pretrained=pretrained, **model_args)
    except VisionAttnError:
        raise
    except Exception as error:
        # Constructors and servers raise all kinds of exceptions.
        raise _explained(name, pretrained, model_args, error) from error
    describe(model, {})
    if checkpoint_path and Path(checkpoint_path).suffix in (".npz", ".npy"):
        timm.models.load_checkpoint(model, str(checkpoint_path))
    elif checkpoint_path:
        load_weights(model, checkpoint_path)
    return model


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        nearest = models.suggest(name[:100]) if isinstance(name, str) else []
        hint = f"Did you mean {' or '.join(nearest)}?" if nearest else "`visionattn list` shows the names."
        raise UnknownNameError(f"There is no model {shorten(name)!r}. {hint}")


def _explained(name: str, pretrained: bool, model_args: Mapping[str, Any], error: Exception) -> Exception:
    """The error to raise for a failure to build a model."""
    first = shorten(str(error).strip().partition("\n")[0] or type(error).__name__, 300).rstrip(".")
    shown = shorten(name)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", first)
    if isinstance(error, TypeError) and unknown and unknown[1] in model_args:
        return ConfigError(f"The model {shown!r} does not take one of these arguments: {first}.")
    if name.startswith(HOSTED):
        return CheckpointError(f"The model {shown!r} could not be loaded: {first}.")
    if "pretrained tag" in first:
        return UnknownNameError(f"{first}. Leave out the part after the dot for the default weights.")
    if isinstance(error, OSError):
        return CheckpointError(f"The weights of {shown!r} could not be downloaded: {first}. Give a weight file.")
    if pretrained and isinstance(error, RuntimeError):
        reason = shorten(" ".join(line.strip() for line in str(error).splitlines()[:3]), 300).rstrip(".")
        return CheckpointError(f"The weights of {shown!r} could not be loaded: {reason}.")
    given = {key: value for key, value in model_args.items() if key not in ("device", "dtype")}
    if not given:
        return error
    arguments = ", ".join(f"{key}={shorten(repr(value), 40)}" for key, value in list(given.items())[:8])
    kind = "" if isinstance(error, (ValueError, AssertionError)) else f"{type(error).__name__}: "
    return ConfigError(f"The model {shown!r} cannot be built with {arguments}: {kind}{first}.")


def create_pretrained(name: str, check: Callable[[nn.Module], None] | None = None, **model_args: Any) -> nn.Module:
    """A model with its published weights, ready for inference.

    Args:
        name: Name in timm's registry, or `hf-hub:REPOSITORY` or `local-dir:FOLDER`.
        check: Raises an error for an unsuitable model; called before weights are downloaded, if possible.
        **model_args: Further arguments of the model.

    Raises:
        UnknownNameError: No model has that name.
        CheckpointError: No weights are published for it, or they could not be downloaded.
    """
    hosted = name.startswith(HOSTED)
    if not hosted:
        _check_name(name)
        try:
            config: Any = timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            hint = "Leave out the part after the dot for the default weights."
            raise UnknownNameError(f"{shorten(error)} {hint}") from error
        if check is not None:
            with torch.device("meta"):
                check(create(name, **model_args))
        if config is None or not config.has_weights:
            raise CheckpointError(
                f"No weights are published for {shorten(name)}: give a weight file, or --random where random "
                "weights will do."
            )
    model = create(name, pretrained=True, **model_args)
    if hosted and check is not None:
        check(model)
    return model.eval()


def load(path: str | Path, name: str | None = None, **model_args: Any) -> nn.Module:
    """Build the model that a weight file belongs to, with its weights, ready for inference.

    For a checkpoint of `visionattn fit`, timm's `model.pretrained_cfg` describes the training images: input_size,
    mean, std, interpolation, crop_pct, crop_mode and label_names. Nothing is imported or downloaded.

    Args:
        path: A checkpoint of `visionattn fit`, a file of bare weights (safetensors, or a pickle, wrapped as training
            code wraps it or not, in our layout or, of the families SPAN and MatchStereo, a published one), either file
            of ncnn's pair .param and .bin, or a folder written by timm's `save_for_hf`.
        name: Model name, if the file does not contain it and its shapes fit several. The authors' MatchFlow files need
            it: without it they are read as MatchStereo, whose shapes they share.
        **model_args: Further arguments of the model.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        CheckpointError: The file is unreadable, or fits no model or not the named one; the first mismatches are named.
            Or its weights are NaN or infinite.
        UnknownNameError: No model has that name.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"The folder {shorten(path)} holds no config.json, so it was not written by save_for_hf."
            )
        return create(f"local-dir:{path}", pretrained=True, **model_args).eval()
    if name is not None:
        _check_name(name)
    content, card = _read(path)
    with _naming(path):
        state = weights.unwrap(content)
        args = {**cca.settings(state), **model_args}
        published = None if card else span.identify(state) or match_stereo.identify(state, name)
    if card is not None and (name is None or name.split(".")[0] == card.name.split(".")[0]):
        name, args = name or card.name, {**card.model_args, **args}
    elif name is None:
        name, settings = published or _identify(path, state)
        args = {**settings, **args}
    elif published and published[0] == name:
        args = {**published[1], **args}
    model = _build(path, name, args, state)
    _fill(model, state, str(path), name)
    if card is not None:
        with _naming(path):
            card.apply(model)
    return model.eval()


def read_card(path: str | Path) -> Card | None:
    """The card in a checkpoint; None for a file of bare weights.

    Raises:
        CheckpointError: The file is unreadable, or its card is damaged.
    """
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[dict[str, Any], Card | None]:
    """The content of a weight file, and its card."""
    ncnn = path.suffix in (".param", ".bin") and path.with_suffix(".param").is_file()
    content: dict[str, Any] = dict(span.read_ncnn(path)) if ncnn else weights.read(path)
    with _naming(path):
        return content, Card.read(content)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file name to errors, and turn errors from damaged weights into one line."""
    try:
        yield
    except VisionAttnError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{shorten(path)}: {error}") from error
    except Exception as error:
        # Detecting the layout uses shapes that a damaged file need not have.
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise CheckpointError(
            f"{shorten(path)} is damaged: its weights do not have the shapes of a network ({reason})."
        ) from error


def classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the weight names of a timm model's classifier; there can be several, or none."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or ()
    return tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))


def _without_classifier(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the model's own classifier, and in the layout and for the image size of the model."""
    heads, own = classifier_keys(model), model.state_dict()
    kept = {key: value for key, value in own.items() if key.startswith(heads)}
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and weights.mismatches({**state, **kept}, own):
        state = convert(state, model)
    return {**state, **kept}


def load_weights(model: nn.Module, path: str | Path, drop_classifier: bool = False) -> None:
    """Load a weight file into a model that it must fit; the input images in its card become the model's.

    Args:
        model: A model of timm's registry.
        path: A file, as `load` takes it.
        drop_classifier: Leave out the file's classifier; the model keeps its own, or has none. Files in another layout
            that timm reads, or of another image size, are converted as timm does.

    Raises:
        CheckpointError: The file is unreadable or does not fit, or holds NaN or infinite values.
    """
    net: Any = model
    path = Path(path)
    content, card = _read(path)
    with _naming(path):
        state = weights.unwrap(content)
        if drop_classifier:
            state = _without_classifier(net, state)
    _fill(model, state, str(path), net.pretrained_cfg.get("architecture") or type(net).__name__)
    if card is not None:
        with _naming(path):
            card.apply(model)


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    """Load weights that must fit and be finite."""
    own = model.state_dict()
    state = _fitting(state, own, source, name)
    weights.check_values(state, own, shorten(source))
    model.load_state_dict({**own, **state})


def _fitting(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, name: str) -> dict[str, Tensor]:
    """Weights in the layout of a model's own.

    Raises:
        CheckpointError: They do not fit it; the first mismatches are named.
    """
    with _naming(Path(source)):
        for family in (span, match_stereo):
            state = family.adapt(state, own)
    if wrong := weights.mismatches(state, own):
        raise CheckpointError(f"{shorten(source)} does not fit {name}: {weights.name_some(wrong)}.")
    return dict(state)


class _TooLarge(CheckpointError):
    """A model is larger than its weight file allows."""


@contextmanager
def _bounded(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Abort building a model that grows far beyond its weights.

    A file can declare anything about its model, such as a depth of a million.
    """
    # A form with branches is several times as large as the fused one.
    tensors, elements = 1000 + 16 * len(state), 2**24 + 16 * weights.count_bytes(state)
    modules = 20 * tensors
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal tensors, elements, modules
        if threading.get_ident() != thread:
            return
        if isinstance(value, Tensor):
            tensors, elements = tensors - 1, elements - value.numel()
        else:
            modules -= 1
        if min(tensors, elements, modules) < 0:
            raise _TooLarge

    handles = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _build(path: Path, name: str, args: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Build a model for the weights of a file, after checking on the meta device that it fits.

    Raises:
        CheckpointError: The model would be far larger than the file, or its weights do not fit.
    """
    # No size can exceed the content of the file.
    largest = 2**16 + weights.count_bytes(state)
    if large := _large_number(args, largest):
        raise CheckpointError(f"{shorten(path)} does not fit {name}: its arguments hold the number {large:.4g}.")
    try:
        with _bounded(state):
            try:
                with torch.device("meta"):
                    shape = create(name, **args)
            except (ConfigError, CheckpointError) as error:
                if not isinstance(error.__cause__, (NotImplementedError, RuntimeError)):
                    raise
                shape = None  # some models compute in their constructor
        if shape is not None:
            _fitting(state, shape.state_dict(), str(path), name)
            return create(name, **args)
        with _bounded(state):
            return create(name, **args)
    except _TooLarge as error:
        raise CheckpointError(
            f"{shorten(path)} does not fit {name}: with the arguments given it is far larger than the file's weights."
        ) from error


def _large_number(value: Any, largest: int) -> float | None:
    """A number among arguments that exceeds `largest`, or None."""
    if isinstance(value, (int, float)):
        return value if abs(value) > largest else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((found for part in parts if (found := _large_number(part, largest)) is not None), None)


def _identify(path: Path, state: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Find the one name of the zoo whose keys and shapes are those of `state`, whatever its classes and channels."""
    fitting, nearest = [], []
    # Without a mixer, va_vit_* have the shapes of minimal ViTs.
    names = [name for name in models.names() if not name.startswith("va_vit_")]
    # Building every model takes many seconds; a family shares the key of its first convolution.
    cards: dict[str, Any] = {name: timm.get_pretrained_cfg(name) for name in names}
    likely = [name for name in names if f"{cards[name].first_conv}.weight" in state]
    for name in likely or names:
        settings = _adaptation(name, state)
        try:
            with torch.device("meta"), _bounded(state):
                wanted = timm.create_model(name, **settings).state_dict()
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError, _TooLarge):
            continue  # cannot be built with this number of classes or channels
        wrong = weights.mismatches(state, wanted)
        nearest.append((len(wrong), name, wrong))
        if not wrong:
            fitting.append((name, settings))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        choice = ", ".join(name for name, _ in fitting)
        raise CheckpointError(
            f"{shorten(path)} fits several models: {choice}. Choose one: visionattn.load(FILE, name=...)."
        )
    if not nearest:
        raise CheckpointError(f"{shorten(path)} fits no model of this package.")
    _, name, wrong = min(nearest)
    raise CheckpointError(
        f"{shorten(path)} fits no model of this package. Nearest: it does not fit {name}: {weights.name_some(wrong)}. "
        "For a model of timm, give its name."
    )


def _adaptation(name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments that set classes and image channels to those of the file."""
    config: Any = timm.get_pretrained_cfg(name)
    settings = cca.settings(state)
    head = state.get(f"{config.classifier}.weight")
    if config.num_classes >= 0:
        settings["num_classes"] = 0 if head is None or not head.ndim else head.shape[0]
    stem = state.get(f"{config.first_conv}.weight")
    if stem is not None and stem.ndim > 1:
        settings["in_chans"] = stem.shape[1]
    return settings
