"""The packaged recipes, and finding them by name."""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Sequence
from pathlib import Path

from visionattn.errors import UnknownNameError, shorten
from visionattn.train.configuration import read_file

__all__ = ["find_recipe", "recipes", "resolve_configs"]


def recipes() -> dict[str, Path]:
    """The packaged recipes: name, such as `classify/minimal_vit_digits`, and file."""
    root = importlib.resources.files("visionattn") / "configs"
    folders = sorted((folder for folder in root.iterdir() if folder.is_dir()), key=lambda folder: folder.name)
    return {
        f"{folder.name}/{Path(file.name).stem}": Path(str(file))
        for folder in folders
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def find_recipe(name: str) -> Path:
    """An existing file, or the packaged recipe of that name, with or without its folder.

    Raises:
        UnknownNameError: Neither exists.
    """
    path = Path(name)
    if len(name) < 1024 and "\0" not in name and path.exists():
        read_file(path)
        return path
    packaged = recipes()
    matches = [key for key in packaged if name.removesuffix(".yaml") in (key, key.split("/")[1])]
    if len(matches) == 1:
        return packaged[matches[0]]
    raise UnknownNameError(f"There is no file or recipe {shorten(name)!r}. The recipes are: {', '.join(packaged)}.")


def resolve_configs(args: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments with recipe names replaced by files, and these files."""
    resolved, configs = [], []
    for before, arg in itertools.pairwise(["", *args]):
        option, equals, value = arg.partition("=")
        if before in ("--config", "-c"):
            configs.append(find_recipe(arg))
            arg = str(configs[-1])
        elif equals and option in ("--config", "-c"):
            configs.append(find_recipe(value))
            arg = f"{option}={configs[-1]}"
        resolved.append(arg)
    return resolved, configs
