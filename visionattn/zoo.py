"""`visionattn list` and `visionattn show`: the models by name, and one model's card."""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import os
import sys
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from visionattn import models
from visionattn.checkpoints import create
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError, UnknownNameError, shorten
from visionattn.progress import new_console

__all__ = ["add_list_arguments", "add_show_arguments", "run_list", "run_show"]


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn list`."""
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern with *")


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn show`."""
    parser.add_argument("name")


def _outline(name: str) -> nn.Module:
    """A model without memory."""
    if name in models.names():
        return create(name, device="meta")
    with torch.device("meta"):
        return create(name)


def _facts(name: str) -> dict[str, str]:
    """What the zoo's table says of a model."""
    model: Any = _outline(name)
    config = model.pretrained_cfg
    size = tuple(config["input_size"])
    images = [size] * len(getattr(model, "input_names", ("image",)))
    return {
        "task": getattr(model, "task", "classify" if model.num_classes else "features"),
        "parameters": f"{count_parameters(model) / 1e6:.2f} M",
        "MACs": f"{count_macs(model, *images) / 1e6:,.1f} M",
        "input": " x ".join(map(str, size)),
        "weights": config.get("tag", "published")
        if config.get("url") or config.get("file") or config.get("hf_hub_id")
        else "none",
    }


def run_list(args: argparse.Namespace) -> int:
    """Run `visionattn list`."""
    names = fnmatch.filter(models.names(), f"*{args.pattern}*")
    if not names:
        raise UnknownNameError(f"No model name fits {args.pattern!r}. `visionattn list` shows all.")
    table = Table("name", box=SIMPLE_HEAD, pad_edge=False)
    for key in _facts(names[0]):
        table.add_column(key, justify="right" if key in ("parameters", "MACs") else "left", no_wrap=True)
    stderr = Console(stderr=True)
    for name in track(names, "Counting", console=stderr, transient=True, disable=not stderr.is_terminal):
        table.add_row(name, *_facts(name).values())
    new_console().print(table)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Run `visionattn show`."""
    if os.path.isfile(args.name):
        raise InputError(f"{shorten(args.name)} is a file: show takes the name of a model.")
    model: Any = _outline(args.name)
    config = model.pretrained_cfg
    documentation = inspect.getdoc(type(model)) or ""
    table = Table(title=args.name, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("what", documentation.split("\n\n")[0].replace("\n", " "))
    name = args.name.split(".")[0]
    if variant := getattr(sys.modules[type(model).__module__], name, None):
        table.add_row("variant", inspect.getdoc(variant) or "")
    for key, value in _facts(args.name).items():
        table.add_row(key, value)
    table.add_row("mean, std", f"{tuple(config['mean'])}, {tuple(config['std'])}")
    multiple = getattr(model, "size_multiple", None)
    sizes = "not stated" if multiple is None else f"any multiple of {multiple}"
    table.add_row("image sizes", "fixed" if config.get("fixed_input_size") else sizes)
    if papers := [str(config[key]) for key in ("paper_name", "paper_ids") if config.get(key)]:
        table.add_row("paper", ", ".join(papers))
    table.add_row("licence", str(config.get("license") or "not stated"))
    table.add_row("in Python", f'import timm, visionattn; timm.create_model("{args.name}")')
    table.add_row("to ONNX", f"visionattn export {args.name} --output model.onnx")
    new_console().print(table)
    return 0
