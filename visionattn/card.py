"""Model cards: what a checkpoint stores about its model, so that it can be used alone.

A task saves one dictionary of plain values next to the weights, under the key `visionattn`:

    format        version of this dictionary: 1
    version       of the library that wrote it
    task          classify, features, retrieve, restore, stereo or flow
    name          of the model in timm's registry
    model_args    arguments that build it, as timm accepts them
    config        input images of the training, with timm's names: input_size (C, H, W), mean, std, interpolation,
                  crop_pct and crop_mode; for a classifier with named classes also label_names
    attributes    of a retrieval model: each name with its values

Reading a card neither imports nor downloads anything: the name must be in timm's registry, and arguments with
the source of weights are omitted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import get_model_args, get_model_input_config
from torch import nn

import visionattn
from visionattn.errors import CheckpointError, shorten

__all__ = ["KEY", "WEIGHT_SOURCES", "Card", "base_name", "describe", "plain_fault"]

KEY = "visionattn"
FORMAT = 1
WEIGHT_SOURCES = (
    "pretrained",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_backbone",
    "backbone_checkpoint",
    "cache_dir",
)
"""Model arguments with the source of weights, which a checkpoint contains itself."""

TASKS = ("classify", "features", "retrieve", "restore", "stereo", "flow")
_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_CROP_MODES = ("center", "squash", "border")
# Datasets of small images, which are used whole; others are cropped as their model requires.
_SHOWN_WHOLE = re.compile(r"digits|mnist|cifar10-sheets|torch/(cifar100?|k?mnist|fashion_mnist|qmnist)")
# Branches are for training; the fused form reads them.
_LEFT_OUT = (*WEIGHT_SOURCES, "branches", "features_only", "out_indices")
_ELSEWHERE = re.compile(r"://|^\s*(hf[-_]hub|local-dir):", re.IGNORECASE)
_LARGEST_SIDE = 2**16
_MOST_VALUES, _DEEPEST, _LONGEST_TEXT = 10**6, 8, 1000


def describe(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Write the input images and the class names of a model into its `pretrained_cfg`.

    Entries missing in `config` follow from the model: its image size, if fixed, and its
    channels. If the channels differ from those of the published weights, the statistics are averaged.

    Args:
        model: A model of timm's registry.
        config: Any of input_size, mean, std, interpolation, crop_pct, crop_mode and label_names.
    """
    net: Any = model
    cfg: dict[str, Any] = dict(getattr(net, "pretrained_cfg", None) or {})
    traits = get_model_input_config(net)
    channels = traits["input_size"][0]
    built_for = traits["fixed_input_size"] or "img_size" in getattr(net, "_model_args", {})
    size = traits["input_size"][1:] if built_for else cfg.get("input_size", (channels, 224, 224))[1:]
    for key in ("mean", "std"):
        if cfg.get(key) and len(cfg[key]) != channels:
            cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * channels
    cfg["input_size"] = (channels, *size)
    if config.get("input_size"):
        # Tests use the same size as training.
        cfg = {key: value for key, value in cfg.items() if key not in ("test_input_size", "test_crop_pct")}
        if not traits["fixed_input_size"]:
            net._traits = {**getattr(net, "_traits", {}), "img_size": None}
    net.pretrained_cfg = net.default_cfg = {**cfg, **config}


@dataclass(frozen=True)
class Card:
    """Description of a checkpoint's model (entries: see the module).

    Entries missing in `config` are the model's own.
    """

    name: str
    model_args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    task: str = "classify"
    attributes: dict[str, list[str]] | None = None
    version: str = ""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Sequence[str]] | None = None,
    ) -> Card | None:
        """The card of a trained model.

        Args:
            model: The network.
            config: Input images of the training; missing entries and None use the model's own.
            attributes: Names and values, of a retrieval model.

        Returns:
            The card, or None for a model that timm's registry does not know.
        """
        net: Any = model
        name = (getattr(net, "pretrained_cfg", None) or {}).get("architecture")
        if not name or not timm.is_model(name):
            return None
        own = resolve_model_data_config(net)
        given = {key: value for key, value in (config or {}).items() if value is not None}
        classes = getattr(net, "num_classes", 0)
        # Models that timm's builder did not create need not accept what it adds, such as num_classes.
        args = get_model_args(net) if hasattr(net, "_traits") else net._model_args
        return cls(
            name,
            {key: _plain(value) for key, value in args.items() if key not in _LEFT_OUT},
            {key: _plain(value) for key, value in {**own, **given}.items() if key in _CONFIG},
            getattr(net, "task", "classify" if classes else "features"),
            None if attributes is None else {key: list(values) for key, values in attributes.items()},
            visionattn.__version__,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Card | None:
        """The card in a checkpoint, or for an older checkpoint one made from its hyper-parameters.

        Args:
            content: The checkpoint's entries.

        Returns:
            The card, or None if the file has another origin and does not describe its model.

        Raises:
            CheckpointError: The entries are damaged, or name something that would have to be downloaded.
        """
        stated = content.get(KEY)
        if stated is None:
            stated = _from_hyper_parameters(content)
        if stated is None:
            return None
        if wrong := _fault(stated):
            raise CheckpointError(f"The model card in the checkpoint is damaged: {wrong}.")
        args = {key: value for key, value in stated["model_args"].items() if key not in _LEFT_OUT}
        if place := _place_elsewhere(args):
            raise CheckpointError(
                f"The checkpoint names {shorten(place)!r} as a part of its model. Files are loaded without downloading "
                "anything: pass that argument of the model yourself."
            )
        return cls(
            _architecture(stated["name"]),
            args,
            {
                key: tuple(value) if isinstance(value, list) else value
                for key in _CONFIG
                if (value := stated["config"].get(key)) is not None
            },
            stated.get("task") or "classify",
            stated.get("attributes"),
            stated.get("version") or "",
        )

    def apply(self, model: nn.Module) -> None:
        """Write the card's entries into the model's `pretrained_cfg`.

        Raises:
            CheckpointError: The model does not accept images of the card's size or channels.
        """
        traits = get_model_input_config(model)
        size = tuple(self.config.get("input_size", traits["input_size"]))
        takes = traits["input_size"] if traits["fixed_input_size"] else (traits["input_size"][0], *size[1:])
        if size != tuple(takes):
            raise CheckpointError(
                f"The checkpoint is for images of {' x '.join(map(str, size))}, but its model takes "
                f"{' x '.join(map(str, takes))}."
            )
        config = dict(self.config)
        if len(config.get("label_names", ())) != getattr(model, "num_classes", 0):
            config.pop("label_names", None)  # the classifier was taken off
        describe(model, {**config, "input_size": size})


def _from_hyper_parameters(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hyper-parameters of older Lightning checkpoints in the form of a card."""
    given = content.get("hyper_parameters")
    if not isinstance(given, dict) or "name" not in given:
        return None
    ours = str(given.get("_class_path", "")).startswith("visionattn.")
    if not ours and not (isinstance(given["name"], str) and timm.is_model(given["name"].split(".")[0])):
        return None  # another project's name of something
    data = content.get("datamodule_hyper_parameters")
    data = data if isinstance(data, dict) else {}
    args = given.get("model_args") or {}
    attributes = given.get("attributes")
    if not isinstance(args, dict):
        return {**given, "config": {}}
    for key in ("num_classes", "in_chans"):
        if given.get(key) is not None and (key == "in_chans" or args.get(key) is None):
            args = {**args, key: given[key]}
    config: dict[str, Any] = {}
    side = data.get("image_size")
    if attributes is not None:
        config["crop_pct"] = 1.0
    elif "dataset" in data:  # of a classifier, or of what is pre-trained like one
        side = None if side is None else [side, side]
        config |= {"mean": data.get("mean"), "std": data.get("std")}
        if _SHOWN_WHOLE.fullmatch(str(data["dataset"])):
            config["crop_pct"] = 1.0
        state = content.get("ClassifyData")
        config["label_names"] = state.get("class_names") if isinstance(state, dict) else None
    if isinstance(side, (list, tuple)) and isinstance(given["name"], str):
        cfg: Any = timm.get_pretrained_cfg(_architecture(given["name"]))  # None for a model registered without one
        channels = args.get("in_chans") or (cfg.input_size[0] if cfg else 3)
        config["input_size"] = [channels, *side]
    return {"name": given["name"], "model_args": args, "config": config, "attributes": attributes}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _fault(stated: Any) -> str | None:
    """What makes a card invalid, as text, or None."""
    if not isinstance(stated, dict):
        return f"it is a {type(stated).__name__}, not a dictionary"
    if wrong := plain_fault(stated):
        return wrong
    if stated.get("format", FORMAT) != FORMAT:
        return f"its format is {shorten(stated['format'])}, and this version reads {FORMAT}: update visionattn"
    for key, kind in {"name": str, "model_args": dict, "config": dict}.items():
        if not isinstance(stated.get(key), kind):
            return f"its {key} must be a {kind.__name__}, but is {shorten(repr(stated.get(key)), 60)}"
    for key, kind in {"task": str, "version": str, "attributes": dict}.items():
        if not isinstance(stated.get(key), (kind, type(None))):
            return f"its {key} must be a {kind.__name__}, but is {shorten(repr(stated[key]), 60)}"
    values = (stated.get("attributes") or {}).values()
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in values):
        return "its attributes must be lists of names"
    return _config_fault(stated["config"])


def _config_fault(config: dict[str, Any]) -> str | None:
    size, labels, crop = config.get("input_size"), config.get("label_names"), config.get("crop_pct")
    if size is not None and not (_is_list(size, int) and len(size) == 3 and all(1 <= n <= _LARGEST_SIDE for n in size)):
        return f"input_size must be channels, height and width, but is {shorten(repr(size), 60)}"
    for key in ("mean", "std"):
        values = config.get(key)
        if values is None:
            continue
        if not _is_list(values, float) or not all(math.isfinite(v) and (key == "mean" or v > 0) for v in values):
            return f"{key} must be finite numbers{', above 0' if key == 'std' else ''}, but is {shorten(values, 60)}"
        if size is not None and len(values) != size[0]:
            return f"{key} has {len(values)} values for {size[0]} channels"
    if crop is not None and not (isinstance(crop, (int, float)) and 0 < crop <= 1):
        return f"crop_pct must be above 0 and at most 1, but is {shorten(repr(crop), 60)}"
    for key, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if config.get(key) is not None and config[key] not in known:
            return f"{key} must be one of {', '.join(known)}, but is {shorten(repr(config[key]), 60)}"
    return None if labels is None or _is_list(labels, str) else "label_names must be a list of names"


def _is_list(values: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else kind
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    )


def plain_fault(stated: Any) -> str | None:
    """What in nested values is not plain, too deep or too large, as text, or None."""
    # Without recursion: a dictionary may contain itself.
    waiting: list[tuple[Any, int]] = [(stated, 0)]
    seen = 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            return "it is nested too deeply, or holds too much"
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
            if not all(isinstance(key, str) for key in value):
                return (
                    f"one of its keys is not a text: {shorten(repr(next(k for k in value if not isinstance(k, str))))}"
                )
        elif isinstance(value, (list, tuple)):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            if len(value) > _LONGEST_TEXT:
                return f"it holds a text of {len(value):,} characters: {shorten(value, 60)}"
        elif value is not None and not isinstance(value, (bool, int, float)):
            return f"it holds a {type(value).__name__}"
    return None


def _place_elsewhere(value: Any) -> str | None:
    """A string among plain values that names a server, a repository or a folder, or None."""
    if isinstance(value, str):
        return value if _ELSEWHERE.search(value) else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((place for part in parts if (place := _place_elsewhere(part))), None)


def base_name(name: str) -> str:
    """The name in the registry of a model that may be named by a repository, such as hf-hub:timm/NAME.TAG."""
    last = re.split(r"[/\\:]", name)[-1]
    return name if last == name else last.split(".")[0]


def _architecture(name: str) -> str:
    """The registry name for a model name in a checkpoint.

    Raises:
        CheckpointError: There is none.
    """
    found = base_name(name)
    if not timm.is_model(found.split(".")[0]):
        elsewhere = (
            " Weight files are loaded without fetching anything: give the model's name." if found != name else ""
        )
        raise CheckpointError(f"The checkpoint is of the model {shorten(name)!r}, which does not exist.{elsewhere}")
    return found
