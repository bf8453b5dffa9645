"""`visionattn list` and `visionattn show`: the models by name, and one model's card.

The costs are stored in `costs.csv`, written by `python -m tools.count_costs`: counting takes half a minute.
The console script lists them from that file only (see `visionattn_command`).
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.table import Table
from torch import nn

from visionattn import models
from visionattn.checkpoints import create
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError, UnknownNameError, shorten
from visionattn.progress import new_console
from visionattn_command import facts, model_table

__all__ = ["COSTS", "Cost", "add_list_arguments", "add_show_arguments", "count", "read_costs", "run_list", "run_show"]

COSTS = Path(__file__).parent / "costs.csv"


class Cost(NamedTuple):
    """A model's task, parameters, multiply-accumulates for its input size, that size, and the source of its weights."""

    task: str
    parameters: int
    macs: int
    input: str
    weights: str


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn list`."""
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern with *")


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn show`."""
    parser.add_argument("name")


def _outline(name: str) -> nn.Module:
    """A model on the meta device."""
    if name in models.names():
        return create(name, device="meta")
    with torch.device("meta"):
        return create(name)


def count(name: str) -> Cost:
    """Build a model on the meta device and count its cost."""
    return _count(_outline(name))


def _count(model: Any) -> Cost:
    config = model.pretrained_cfg
    images = [tuple(config["input_size"])] * len(getattr(model, "input_names", ("image",)))
    task = getattr(model, "task", "classify" if model.num_classes else "features")
    size = " x ".join(map(str, config["input_size"]))
    return Cost(task, count_parameters(model), count_macs(model, *images), size, _weights(config))


def _weights(config: Mapping[str, Any]) -> str:
    """Source of the weights in timm's configuration: "shipped" is part of this package."""
    if config.get("file"):
        return "shipped"
    return "download" if config.get("url") or config.get("hf_hub_id") else "none"


def read_costs() -> dict[str, Cost]:
    """The stored costs of all models of this package."""
    with COSTS.open(newline="", encoding="utf-8") as file:
        return {
            row["name"]: Cost(row["task"], int(row["parameters"]), int(row["macs"]), row["input"], row["weights"])
            for row in csv.DictReader(file)
        }


def run_list(args: argparse.Namespace) -> int:
    """Run `visionattn list`."""
    names = fnmatch.filter(models.names(), f"*{args.pattern}*")
    if not names:
        raise UnknownNameError(f"No model name fits {args.pattern!r}. `visionattn list` shows all.")
    costs = read_costs()
    # User-registered names are not in the table.
    rows = [{"name": name, **(costs.get(name) or count(name))._asdict()} for name in names]
    new_console().print(model_table(rows))
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
    cost = (read_costs().get(name) or _count(model))._replace(weights=_weights(config))
    if cost.weights != "none" and config.get("tag"):
        cost = cost._replace(weights=f"{cost.weights} ({config['tag']})")
    for row in zip(("task", "parameters", "MACs", "input", "weights"), facts(cost._asdict())):
        table.add_row(*row)
    others = [other for other in timm.list_pretrained(f"{name}.*") if other.split(".")[1] != config.get("tag")]
    if others:
        table.add_row("other weights", ", ".join(others))
    table.add_row("mean, std", f"{tuple(config['mean'])}, {tuple(config['std'])}")
    multiple = getattr(model, "size_multiple", None)
    sizes = "not stated" if multiple is None else f"any multiple of {multiple}"
    table.add_row("image sizes", "fixed" if config.get("fixed_input_size") else sizes)
    if papers := [str(config[key]) for key in ("paper_name", "paper_ids") if config.get(key)]:
        table.add_row("paper", ", ".join(papers))
    table.add_row("licence", str(config.get("license") or "not stated"))
    pretrained = "" if cost.weights == "none" else ", pretrained=True"
    table.add_row("in Python", f'import timm, visionattn; timm.create_model("{args.name}"{pretrained})')
    table.add_row("to ONNX", f"visionattn export {args.name} --output model.onnx")
    console = new_console()
    console.print(table)
    card = config.get("file") and Path(config["file"]).with_suffix(".md")
    if card and card.is_file():  # data, command, results and terms of weights in the package
        _, _, text = card.read_text(encoding="utf-8").partition("\n")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
