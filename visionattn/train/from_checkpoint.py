"""Settings that `visionattn validate`, `test` and `predict` read from a checkpoint, so that its path is enough.

The checkpoint's task, its hyper-parameters and those of its data module become a configuration, which command-line
options override. The weights are the checkpoint's: initial weights of the training are not loaded again. Unlike a
recipe, a checkpoint is untrusted: it can only name tasks and data modules of this package or already imported ones, and
no remote data.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from visionattn.card import WEIGHT_SOURCES, Card, plain_fault
from visionattn.errors import CheckpointError, ConfigError, shorten
from visionattn.opening import WEIGHT_FILES
from visionattn.train.checkpoint_io import AtomicCheckpointIO
from visionattn.train.configuration import argument_names
from visionattn.train.optimization import FROM_DATA

__all__ = ["expand_positionals", "said_by_checkpoint", "trusted_class", "without_sources"]

EVALUATIONS = ("validate", "test", "predict")
POSITIONALS: dict[str, tuple[str, ...]] = {
    "fit": ("config", "data.root"),
    **dict.fromkeys(EVALUATIONS, ("ckpt_path", "data.root")),
}
"""Positional arguments of each command."""
_CHECKPOINT = re.compile(r"--checkpoint(?==|$)")
_CLASSIFICATION = "visionattn.data.classify.ClassifyData"
# Settings that only training uses.
_FOR_TRAINING = {"augmentation": "none", "download": False, "teacher": None}
_SERVERS = re.compile(r"://|^\s*pipe:|^(hfds|hfids|tfds)/", re.IGNORECASE)


def expand_positionals(args: Sequence[str]) -> list[str]:
    """`predict FILE FOLDER` -> `predict --ckpt_path FILE --data.root FOLDER`, likewise for validate and test.

    `fit RECIPE FOLDER` is `fit --config RECIPE --data.root FOLDER`. The option `--checkpoint` of all four commands
    becomes Lightning's `--ckpt_path`.
    """
    args = [_CHECKPOINT.sub("--ckpt_path", arg) for arg in args]
    if not args or args[0] not in POSITIONALS:
        return args
    named: list[str] = []
    while len(args) > 1 + len(named) and len(named) < 2 and not args[1 + len(named)].startswith("-"):
        named.append(args[1 + len(named)])
    if args[0] == "fit" and named and Path(named[0]).suffix in WEIGHT_FILES:
        return args  # a checkpoint is not a recipe
    names = POSITIONALS[args[0]]
    if args[0] == "fit" and len(named) == 1 and Path(named[0]).is_dir():
        names = ("data.root",)  # uses the recipe for folders
    options = [f"--{option}={value}" for option, value in zip(names, named)]
    return [args[0], *options, *args[1 + len(named) :]]


def _find_option(args: Sequence[str], option: str) -> str | None:
    """The value of an option in a command line, or None."""
    found = None
    for number, arg in enumerate(args):
        if arg == f"--{option}" and number + 1 < len(args):
            found = args[number + 1]
        elif arg.startswith(f"--{option}="):
            found = arg.partition("=")[2]
    return found


def _settings(path: str, args: Sequence[str]) -> dict[str, Any]:
    """The configuration stored in a checkpoint.

    Args:
        path: The checkpoint.
        args: The command line; its options for model and data take precedence.

    Raises:
        CheckpointError: The file cannot be read, does not identify its task, or names something untrusted.
    """
    content = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    card = Card.read(content)
    settings: dict[str, Any] = {}
    name = _find_option(args, "model.name")
    if not any(re.match(r"--model(=|\.class_path|$)", arg) for arg in args):
        model = _model(path, content, card)
        # Options change single settings; for another network the checkpoint's settings do not apply.
        if name is None or name == model["init_args"].get("name"):
            settings["model"] = model
    if not any(re.match(r"--data(=|\.class_path|$)", arg) for arg in args):
        settings["data"] = _data(path, content, card, args)
    return settings


@contextmanager
def said_by_checkpoint(args: Sequence[str]) -> Iterator[list[str]]:
    """Options from a checkpoint, placed before all others, for a command with a checkpoint and no recipe.

    Raises:
        CheckpointError: The checkpoint cannot be read, or lacks them.
        ConfigError: Training is resumed from a checkpoint without the configuration of its run.
    """
    path = _find_option(args, "ckpt_path")
    if path is None or any(arg.startswith(("--config", "-c")) for arg in args):
        yield []
        return
    config = Path(path).resolve().parent.parent / "config.yaml"
    if args[0] == "fit" and config.is_file():
        raise ConfigError(f"Resuming needs the configuration of the run: add --config {shorten(config)}.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.yaml"
        file.write_text(yaml.safe_dump(_settings(path, args)))
        yield ["--config", str(file)]


def _model(path: str, content: Mapping[str, Any], card: Card | None) -> dict[str, Any]:
    given = content.get("hyper_parameters") or {}
    if "_class_path" not in given:
        raise CheckpointError(
            f"{shorten(path)} does not identify its task: give the run's configuration with --config RUN/config.yaml."
        )
    task = trusted_class(path, given["_class_path"], LightningModule)
    values = {key: value for key, value in _arguments(path, task, given).items() if key not in FROM_DATA}
    return {"class_path": given["_class_path"], "init_args": without_sources(values, card)}


def _data(path: str, content: Mapping[str, Any], card: Card | None, args: Sequence[str]) -> dict[str, Any]:
    given = content.get("datamodule_hyper_parameters") or {}
    class_path = given.get("_class_path", _CLASSIFICATION)
    kind = trusted_class(path, class_path, LightningDataModule)
    values = _arguments(path, kind, given)
    classification = kind is trusted_class(path, _CLASSIFICATION, LightningDataModule)
    root = _find_option(args, "data.root")
    if classification and _find_option(args, "data.dataset") is None:
        if root is None and "dataset" not in values:
            raise CheckpointError(f"{shorten(path)} does not identify its data: give an image folder with --data.root.")
        # Images to predict are read from a folder, whatever data the model was trained on.
        if root is not None and (args[0] == "predict" or values.get("root") is None):
            values |= {"dataset": "folder", "root": None}
    if root is not None:
        values["root"] = root
    elif place := next((text for text in _texts(values) if _SERVERS.search(text)), None):
        raise CheckpointError(
            f"{shorten(path)} names data that is not on this machine, {shorten(place)!r}: give the run's "
            "configuration with --config RUN/config.yaml, or a folder with --data.root."
        )
    if card is not None and "num_classes" in card.model_args and classification:
        # Images to predict need no class folders.
        values["num_classes"] = values.get("num_classes") or card.model_args["num_classes"] or None
    return {"class_path": class_path, "init_args": values}


def _arguments(path: str, kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as arguments of a class."""
    if wrong := plain_fault(given):
        raise CheckpointError(f"The hyper-parameters in {shorten(path)} are damaged: {wrong}.")
    values = {key: value for key, value in given.items() if not key.startswith("_")}
    known = argument_names(kind)
    if unknown := [key for key in values if key not in known]:
        raise CheckpointError(
            f"{shorten(path)} has hyper-parameters that {kind.__name__} does not accept: {shorten(', '.join(unknown))}."
        )
    return values | {key: value for key, value in _FOR_TRAINING.items() if key in values}


def trusted_class(path: str, class_path: Any, base: type) -> type:
    """A class that a checkpoint names, from this package or already imported.

    Raises:
        CheckpointError: It is any other class.
    """
    module, _, name = str(class_path).rpartition(".")
    if module.startswith("visionattn."):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            module = ""
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise CheckpointError(
            f"{shorten(path)} names the class {shorten(class_path)!r}, which is not part of visionattn; classes named "
            "in checkpoints are not imported: give the run's configuration with --config RUN/config.yaml."
        )
    return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [text for part in parts for text in _texts(part)]


def without_sources(values: Mapping[str, Any], card: Card | None) -> dict[str, Any]:
    """Arguments of a task without the initial weights of its training; the checkpoint has the trained ones.

    Args:
        values: The arguments.
        card: Card of the checkpoint, which describes how a model from a repository is built.
    """
    values = dict(values)
    args = {key: value for key, value in (values.get("model_args") or {}).items() if key not in WEIGHT_SOURCES}
    if card is not None and str(values.get("name", card.name)).partition(":")[2]:
        values["name"] = card.name
        args = {
            **{key: value for key, value in card.model_args.items() if key not in (*FROM_DATA, "in_chans")},
            **args,
        }
    if "model_args" in values:
        values["model_args"] = args
    if values.get("pretrained"):
        values["pretrained"] = False
    if values.get("checkpoint"):
        values["checkpoint"] = None
    return values
