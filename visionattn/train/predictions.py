"""The file that `visionattn predict` writes: one row per image, as CSV or JSON."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from visionattn.errors import ConfigError
from visionattn.files import atomic_path
from visionattn.train.announce import say

__all__ = ["Form", "check_form", "predictions_path", "write_predictions"]


class Form(NamedTuple):
    """Content of the file for each image.

    Attributes:
        top: Number of most likely classes.
        probabilities: Write the probability of every class instead.
    """

    top: int = 1
    probabilities: bool = False


def check_form(cli: Any, top: int, probabilities: bool) -> Form:
    """Check the options.

    Raises:
        ConfigError: `top` exceeds the number of classes, the task has no classes, or both options are given.
    """
    if (top, probabilities) == (1, False):
        return Form()
    if not hasattr(cli.model, "judgements"):
        raise ConfigError(f"--top and --probabilities need a classifier; the task is {type(cli.model).__name__}.")
    if top != 1 and probabilities:
        raise ConfigError("--probabilities includes every class: remove --top.")
    classes = cli.model.hparams.num_classes
    if not 1 <= top <= classes:
        raise ConfigError(f"--top must be from 1 to {classes}, the number of classes; got {top}.")
    return Form(top, probabilities)


def predictions_path(trainer: Any, output: str | None) -> Path:
    """Path of this rank's predictions."""
    path = Path(output) if output else Path(trainer.default_root_dir) / "predictions.csv"
    return path.with_stem(f"{path.stem}-rank{trainer.global_rank}") if trainer.world_size > 1 else path


def write_predictions(cli: Any, outputs: list[Any], path: Path, form: Form) -> None:
    """Write the name and the prediction of each readable image."""
    classes = getattr(cli.datamodule, "class_names", None)
    columns, rows = _table(cli.model, outputs, classes, form)
    records = (dict(zip(columns, row)) for row in _named(cli, rows))
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        if path.suffix == ".json":
            # Names may not be valid UTF-8: JSON escapes them.
            json.dump([_nested(record, form) for record in records], file, indent=1)
            file.write("\n")
        else:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(record.values() for record in records)
    say(cli.trainer, f"The predictions are in {path}.")


def _table(model: Any, outputs: list[Any], classes: list[str] | None, form: Form) -> tuple[list[str], Iterator[Any]]:
    """Column names, and the values of each image after its name."""
    if form == Form():
        return ["image", *model.prediction_columns], (
            row for output in outputs for row in model.prediction_rows(output, classes)
        )
    names = classes or [str(label) for label in range(model.hparams.num_classes)]
    rows = (row for output in outputs for row in output["probabilities"])
    if form.probabilities:
        return ["image", *names], ([_digits(value) for value in row] for row in rows)
    places = ["", *(f"_{place}" for place in range(2, form.top + 1))]
    columns = [f"{name}{place}" for place in places for name in ("label", "class", "probability")]
    return ["image", *columns], (_ranked(row, names, form.top) for row in rows)


def _ranked(row: Tensor, names: list[str], top: int) -> list[Any]:
    values, labels = row.topk(top)
    found = zip(labels.tolist(), values)
    return [part for label, value in found for part in (label, names[label], _digits(value))]


def _digits(value: Tensor) -> str:
    return f"{value.item():.6f}"


def _named(cli: Any, rows: Iterator[Any]) -> Iterator[list[Any]]:
    """The rows of this rank after the names of their images, without unreadable images."""
    trainer, data = cli.trainer, cli.datamodule
    names = data.predicted_names() if hasattr(data, "predicted_names") else itertools.count()
    unread = data.unpredicted() if hasattr(data, "unpredicted") else set()
    # Ranks interleave their images.
    named = itertools.islice(enumerate(names), trainer.global_rank, None, trainer.world_size)
    for row, (index, name) in zip(rows, named):
        if index not in unread:
            yield [name, *row]


def _nested(record: dict[str, Any], form: Form) -> dict[str, Any]:
    """A row for JSON: probabilities are numbers, and several classes a list or a mapping."""
    image, *values = record.items()
    if form.probabilities:
        return {"image": image[1], "probabilities": {name: float(value) for name, value in values}}
    plain = [(key, float(value) if key.startswith("probability") else value) for key, value in values]
    if form.top == 1:
        return dict([image, *plain])
    keys = ("label", "class", "probability")
    classes = [dict(zip(keys, (value for _, value in plain[start : start + 3]))) for start in range(0, len(plain), 3)]
    return {"image": image[1], "classes": classes}
