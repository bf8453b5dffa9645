"""Reading configurations: bounded YAML, checks for NaN, and one-line error messages."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from jsonargparse import _loaders_dumpers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.enums import StrEnum

from visionattn.errors import ConfigError, VisionAttnError, shorten

__all__ = [
    "DEFAULT_RECIPE",
    "argument_names",
    "check_numbers",
    "check_text",
    "explain",
    "explain_fault",
    "explain_option",
    "missing_package",
    "read_file",
    "use_bounded_yaml",
    "with_recipe",
]

DEFAULT_RECIPE = "classify/finetune_folder"
"""Default recipe for training on a folder of images."""
LONGEST_TEXT = 2**20
MOST_NODES = 100_000
DEEPEST = 50
# Shorter texts without aliases cannot exceed the bounds by much.
_HARMLESS = 200


def read_file(path: Path) -> None:
    """Check that a configuration file can be read.

    Raises:
        ConfigError: It is not a regular file, too large, not UTF-8, or beyond the bounds of `check_text`.
    """
    try:
        if not path.is_file() or path.stat().st_size > LONGEST_TEXT:
            raise ConfigError(f"{shorten(path)} is not a file of at most {LONGEST_TEXT:,} bytes.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shorten(path)} is not text in UTF-8: save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"Could not read {shorten(path)}: {error.strerror or error}.") from error
    try:
        check_text(text)
        content = yaml.load(text, Loader=_loaders_dumpers.get_yaml_default_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"{shorten(path)} is not YAML: {shorten(error, 200)}.") from error
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{shorten(path)}: {shorten(error, 200)}") from error
    if not isinstance(content, (dict, type(None))):
        raise ConfigError(f"{shorten(path)} must hold settings, a YAML mapping; got a {type(content).__name__}.")


def check_text(text: str) -> None:
    """Bound the expansion of a YAML text before it is built: aliases can be recursive, and nesting is unlimited.

    Raises:
        ConfigError: It is too long, too deep, or expands to too many values.
    """
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"A setting must have at most {LONGEST_TEXT:,} characters; got {len(text):,}.")
    if len(text) < _HARMLESS and "*" not in text:
        return
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > DEEPEST:
                break
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(
                    f"A YAML alias names {shorten(event.anchor, 40)!r}, which contains itself or is missing."
                )
            anchor, size = None, sizes[event.anchor]
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        parent, so_far = open_nodes.pop()
        open_nodes.append((parent, so_far + size))
        if so_far + size > MOST_NODES:
            break
    if open_nodes[-1][1] > MOST_NODES or len(open_nodes) > DEEPEST:
        raise ConfigError(f"The settings expand to more than {MOST_NODES:,} values, or are nested too deeply.")


def use_bounded_yaml() -> None:
    """Let jsonargparse check YAML by `check_text`, in files and in command-line options."""

    def load(text: str) -> Any:
        check_text(text)
        return _loaders_dumpers.yaml_load(text)

    jsonargparse.set_loader("yaml", load, exceptions=(yaml.YAMLError,))
    # Defaults of Lightning's callbacks are such texts, and must be representable in a run's config.yaml.
    yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, text: dumper.represent_str(text.value))


def check_numbers(settings: Any, name: str = "") -> None:
    """Refuse NaN settings.

    Raises:
        ConfigError: A value is NaN.
    """
    if isinstance(settings, float) and math.isnan(settings):
        raise ConfigError(f"{name.replace('.init_args', '')} must be a number; got nan.")
    if isinstance(settings, Mapping) or hasattr(settings, "as_dict"):
        for key, value in dict(vars(settings) if hasattr(settings, "as_dict") else settings).items():
            check_numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, (list, tuple)):
        for number, value in enumerate(settings):
            check_numbers(value, f"{name}[{number}]")


def with_recipe(args: Sequence[str]) -> list[str]:
    """Add the default recipe to `fit` on a folder without a recipe or a dataset name."""
    options = {arg.partition("=")[0] for arg in args}
    names_data = any(option in ("--data", "--data.class_path", "--data.dataset") for option in options)
    if args[:1] != ["fit"] or "--data.root" not in options or names_data or options & {"--config", "-c", "--ckpt_path"}:
        return list(args)
    return ["fit", "--config", DEFAULT_RECIPE, *args[1:]]


def argument_names(kind: type) -> list[str]:
    """Arguments of a task or data module, including those passed on to its bases by `**`."""
    names = (name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters)  # type: ignore[misc]
    return list(dict.fromkeys(names))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def missing_package(error: BaseException) -> str | None:
    """How to install a package, if an error says that it is missing."""
    required = re.search(r"Requirement '([A-Za-z][\w.-]*)[^']*' not met", str(error))
    package = required[1] if required else None
    if package is None and isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
    if package in (None, "visionattn"):
        return None
    return f"This needs the package {package!r}, which is not installed: pip install {package}"


def explain(error: BaseException) -> str:
    """Why a configuration is invalid, in one line.

    Args:
        error: Exception from parsing or building; jsonargparse wraps those of the model's and the data's constructors.
    """
    for cause in _chain(error):
        if isinstance(cause, (VisionAttnError, MisconfigurationException)):
            return str(cause)
        if message := missing_package(cause):
            return message
    if isinstance(error, RecursionError):
        return "The configuration is nested too deeply, or contains itself."
    causes = [cause for cause in _chain(error) if str(cause)]
    return _plain(str(causes[0] if causes else type(error).__name__))


def _plain(text: str) -> str:
    """Jsonargparse's message without its tree of types."""
    noise = r"does not validate against|subtypes:|errors:|given value|expected a <class 'nonetype'>"
    lines = [re.sub(r"^[\s-]*-\s+", "", line).strip() for line in text.splitlines()[:200]]
    lines = [line for line in dict.fromkeys(lines) if line and not re.match(noise, line, re.IGNORECASE)]
    text = re.sub(
        r"Expected a path but (.*?) either not accessible or invalid", r"'\1' cannot be used.", " ".join(lines)
    )
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"Parser key \"(\w+)\": Problem with given class_path '[^']+': Parser key \"", r'"\1.', text)
    return shorten(text, 400)


def explain_option(error: Exception, args: Sequence[str], settings: Collection[str], command: str | None) -> str:
    """Like `explain`, and suggests similar names for an unknown option.

    Args:
        error: Exception from the parser.
        args: The command line.
        settings: All settings of the command.
        command: The command; None if it is unknown.
    """
    message = explain(error)
    text = re.sub(r"\s+", " ", str(error)[:20_000])
    option = re.search(
        r"Option '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)", text
    )
    if option is None or command is None:
        return message
    unknown = next(group for group in option.groups() if group)
    section = re.match(r'\s*Parser key "(\w+)"', text)
    class_path = re.search(r"class_path '([^']+)'", text)
    known, prefix = list(settings), ""
    if section and class_path:
        module, _, name = class_path.group(1).rpartition(".")
        known = argument_names(getattr(importlib.import_module(module), name))
        prefix = f"{section.group(1)}."
    nearest = [prefix + name for name in difflib.get_close_matches(unknown[:100], known, cutoff=0.5)]
    hint = f"Did you mean {', '.join(nearest)}?" if nearest else f"visionattn {command} --help lists the settings."
    return f"There is no setting {shorten(prefix + unknown)}. {hint}"


def explain_fault(error: BaseException | None) -> str | None:
    """The message of a user error or a system error; None for a bug in the program."""
    # jsonargparse wraps exceptions from the constructors of model and data.
    while error is not None:
        if isinstance(error, (VisionAttnError, MisconfigurationException)):
            return str(error)
        if message := missing_package(error):
            return message
        if isinstance(error, torch.OutOfMemoryError):
            return "Out of device memory: reduce data.batch_size or the image size."
        if isinstance(error, MemoryError):
            return "There is not enough memory for this."
        if isinstance(error, OSError) and error.errno is not None:
            return f"{shorten(error.filename or 'the system')}: {error.strerror}."
        if isinstance(error, (RuntimeError, TypeError, ValueError)) and _raised_by_lightning(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised the error, such as for a monitored metric that is never logged."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("lightning.")
