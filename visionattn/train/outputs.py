"""Files of a run other than its checkpoints: the table of metrics, a report, and a list of unreadable images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from visionattn.cost import count_macs, count_parameters
from visionattn.data.module import DataModule, list_skipped
from visionattn.errors import ConfigError, InputError, shorten
from visionattn.files import check_folder
from visionattn.train.announce import run_title, say
from visionattn.train.report import write_report

__all__ = ["check_report", "report_test", "tell_skipped", "write_summary"]


def write_summary(cli: Any, measured: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write a table of the metrics of each split, and of the cost of the model."""
    model, data = cli.model, cli.datamodule
    rows: dict[str, dict[str, str]] = {}
    for part, metrics in measured.items():
        for key, value in metrics.items():
            prefix, _, measure = key.partition("/")
            if prefix == part and not (part == "train" and measure != "images_per_second"):
                shown = f"{value:,.0f}" if measure == "images_per_second" else f"{value:.4f}"
                rows.setdefault(measure.replace("_per_", "/").replace("_", " "), {})[part] = shown
    table = Table(title=run_title(model))
    table.add_column("measure")
    names = {"train": "training", "val": "validation", "test": "test"}
    if isinstance(data, DataModule) and "test" in measured and data.tests_on_validation:
        names["test"] = "test (the validation split)"
    for part in measured:
        table.add_column(names[part], justify="right")
    for measure, values in rows.items():
        table.add_row(measure, *(values.get(part, "") for part in measured))
    net = model.for_use() if hasattr(model, "for_use") else getattr(model, "net", None)
    shape = getattr(data, "image_shape", None)
    if net is not None and shape is not None:
        empty = [""] * (len(measured) - 1)
        table.add_section()
        table.add_row("parameters", *empty, f"{count_parameters(net):,}")
        inputs = [shape] * len(getattr(net, "input_names", ("image",)))
        table.add_row("multiply-accumulates", *empty, f"{count_macs(net, *inputs):,}")
    say(cli.trainer, table)


def check_report(cli: Any, folder: str) -> None:
    """Refuse a folder that already holds a report, and a task without reports.

    Raises:
        ConfigError: The task is not classification.
        InputError: The folder holds a report, or cannot be used for one.
    """
    if not hasattr(cli.model, "judgements"):
        raise ConfigError(f"--output writes reports of classifiers only; the task is {type(cli.model).__name__}.")
    check_folder(folder)
    if (Path(folder) / "report.html").exists() and not cli._get(cli.config_init, "overwrite"):
        raise InputError(f"{shorten(folder)} holds a report: give another folder, or --overwrite.")


def report_test(cli: Any, folder: Path) -> None:
    """Write the report of the test that has just run."""
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    if trainer.world_size > 1 or not hasattr(data, "picture"):
        say(trainer, "No report: it is written by `visionattn test CHECKPOINT FOLDER --output REPORT`, on one device.")
        return
    classes = data.class_names or [str(label) for label in range(model.hparams.num_classes)]
    results = model.judgements.results(classes)
    if results is None or data.is_stream("test"):
        say(trainer, "No report: the test images are a stream, or none of them could be read.")
        return
    settings = {"model": model.hparams.name, "data": str(data.hparams.root or data.hparams.dataset)}
    if trainer.ckpt_path:
        settings["checkpoint"] = str(trainer.ckpt_path)
    metrics = Path(trainer.log_dir) / "metrics.csv" if trainer.log_dir else None
    split = "val" if data.tests_on_validation else "test"
    title = f"{run_title(model)} on {Path(settings['data']).name}"
    page = write_report(folder, results, data, split, title, settings, model.frozen, metrics)
    say(trainer, f"The report is {page}.")


def tell_skipped(cli: Any) -> bool:
    """List the unreadable images of all ranks, and return whether there are any."""
    skipped = cli.datamodule.skipped() if isinstance(cli.datamodule, DataModule) else []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, skipped)
        skipped = list(dict.fromkeys(why for rank in ranks for why in rank))
    for line in list_skipped(skipped):
        say(cli.trainer, line)
    return bool(skipped)
