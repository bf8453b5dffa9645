"""Attribute retrieval: queries rank the gallery by each attribute (`visionattn.metrics.ranking`).

A model with conditions ranks by each attribute in that attribute's space; a model without conditions has one space for
all. Entry (i, j) of the entanglement matrix is the mAP by attribute j in the space of condition i: if the spaces
separate the attributes, the maximum of each column is on the diagonal. The row "random" ranks by random embeddings: the
score that an attribute's imbalance alone gives.

For triplets (Zappos), the metric is the fraction whose near image is closer than the far one, per condition.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from visionattn import __version__
from visionattn.data.images import check_unreadable
from visionattn.data.retrieval.catalogue import Catalogue, ImageStore
from visionattn.data.retrieval.catalogue_files import Triplets, read_catalogue, read_triplets
from visionattn.data.retrieval.embedding import (
    EMBEDDING_TASKS,
    check_embedding,
    check_finite,
    conditions_of,
    embed,
    eval_transform,
    input_config,
)
from visionattn.devices import find_device
from visionattn.errors import ConfigError, DataError, shorten
from visionattn.evaluate.opening import open_models, place
from visionattn.files import atomic_path
from visionattn.metrics.ranking import AttributeScore, means, score, score_triplets
from visionattn.moved import renamed_keywords
from visionattn.progress import counted

__all__ = [
    "MeasuredRetrieval",
    "RetrievalMeasurements",
    "draw_matrix",
    "embed_images",
    "evaluate_retrieval",
    "evaluate_triplets",
]

RANDOM = "random"
RANDOM_DIMENSIONS = 64
CELL, LABEL = 72, 150  # pixels in the image of a matrix
MOST = 100  # attributes in the image of a matrix


@dataclass(frozen=True)
class MeasuredRetrieval:
    """A model's score by an attribute in the space of a condition ("" for a model with one space)."""

    model: str
    condition: str
    score: AttributeScore


@dataclass
class RetrievalMeasurements:
    """Result of `evaluate_retrieval`.

    Attributes:
        data: Path of the items.
        part: Evaluated split.
        attributes: Its attributes, in order.
        device: Device of the models.
        dtype: Precision of the models.
        rows: One row per model, condition and attribute.
        failures: One line per image that could not be read; the ranking leaves it out.
    """

    data: str
    part: str
    attributes: tuple[str, ...]
    device: str
    dtype: str
    rows: list[MeasuredRetrieval] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def own(self, model: str) -> list[AttributeScore]:
        """A model's scores by each attribute, in that attribute's own space or the only one."""
        return [row.score for row in self.rows if row.model == model and row.condition in ("", row.score.attribute)]

    def matrix(self, model: str) -> Tensor | None:
        """The entanglement matrix (C, C) of mAP, condition by attribute; None for a model with one space."""
        found = {(row.condition, row.score.attribute): row.score.map for row in self.rows if row.model == model}
        if any(condition == "" for condition, _ in found):
            return None
        return torch.tensor([[found[i, j] for j in self.attributes] for i in self.attributes])

    def table(self) -> Table:
        """One row per model and attribute, and for the means."""
        table = Table("model", "attribute", "queries", "gallery", "mAP", "recall@1", "recall@5", "recall@10")
        for column in table.columns[2:]:
            column.justify = "right"
        for model in dict.fromkeys(row.model for row in self.rows):
            scores = self.own(model)
            for row in (*scores, *means(scores)):
                shares = (f"{100 * share:.1f}" for share in row[3:])
                names = (Text(shorten(Path(model).name)), Text(shorten(row.attribute)))
                table.add_row(*names, str(row.queries), str(row.gallery), *shares)
            table.add_section()
        return table

    def matrix_table(self, model: str) -> Table | None:
        """The entanglement matrix in percent; None for a model with one space."""
        matrix = self.matrix(model)
        if matrix is None:
            return None
        table = _table_of(f"mAP, {Path(model).name}: condition", *self.attributes)
        for name, values in zip(self.attributes, matrix.tolist()):
            table.add_row(Text(shorten(name)), *(f"{100 * value:.1f}" for value in values))
        return table

    def write(self, path: str | Path) -> None:
        """Write all rows, with all pairs of condition and attribute, as CSV; scores in percent.

        Raises:
            StorageError: The file could not be written.
        """
        origin = {"data": self.data, "part": self.part, "device": self.device, "dtype": self.dtype}
        origin |= {"torch": torch.__version__, "visionattn": __version__}
        with (
            atomic_path(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["model", "condition", *AttributeScore._fields, *origin])
            for model in dict.fromkeys(row.model for row in self.rows):
                rows = [(row.condition, row.score) for row in self.rows if row.model == model]
                for condition, score in [*rows, *(("", mean) for mean in means(self.own(model)))]:
                    shares = (f"{100 * share:.3f}" for share in score[3:])
                    writer.writerow([model, condition, *score[:3], *shares, *origin.values()])


@renamed_keywords(part="split")
def evaluate_retrieval(
    models: str | Path | nn.Module | Sequence[str | Path | nn.Module],
    data: Catalogue | str | Path,
    *,
    layout: str = "table",
    images: str | Path | None = None,
    attributes: Sequence[str] | None = None,
    min_count: int = 0,
    split: str = "test",
    image_size: tuple[int, int] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "float32",
    console: Console | None = None,
) -> RetrievalMeasurements:
    """Evaluate models on a split of a catalogue, compared with random embeddings.

    Args:
        models: None, one or several, each a name with pretrained weights, a weight file, or a module that takes
            (B, 3, H, W). A model with conditions must have one for each evaluated attribute.
        data: A catalogue, or its file or folder (see `visionattn.data.retrieval.catalogue_files`).
        layout: Layout of the file or folder.
        images: Folder or zip file of the images. Default: as in the layout.
        attributes: Attributes to evaluate. Default: all.
        min_count: Values with fewer training items count as unknown.
        split: "train", "val" or "test".
        image_size: Height and width of the images. Default: that of each model.
        batch_size: Images per forward pass.
        device: Device of the models: "auto" (a GPU if available), "cpu" or "cuda:1".
        dtype: Precision of weights and activations: float32, float16, bfloat16 or float64.
        console: Console for a progress bar. Default: no progress bar.

    Raises:
        ConfigError: The layout, an attribute, the device or the dtype does not exist, or a model lacks an attribute.
        CheckpointError: A weight file is unreadable or fits no model, or no weights are available for a name.
        DataError: A file is missing or damaged, more than 10 % of the images are, or a split has no queries, no
            gallery or no match.
        InputError: A model gives no finite embeddings for images of that size.
    """
    if isinstance(data, Catalogue):
        catalogue, origin = data, str(data.images.path)
    else:
        catalogue, origin = read_catalogue(layout, data, images, attributes, min_count), str(data)
    device = str(find_device(device))
    networks = _opened(models, device, dtype, image_size)
    for label, network in networks.items():
        known = conditions_of(network)
        if known and (lacking := [name for name in catalogue.attributes if name not in known]):
            raise ConfigError(
                f"{label} has no condition for {', '.join(lacking)}, only for {', '.join(known)}: "
                "select attributes with --attributes (attributes=)."
            )
    items = catalogue.part(split)
    count = len(items.images)
    unreadable: dict[str, str] = {}
    spaces = {
        label: _embed(label, network, catalogue.images, items.images, image_size, batch_size, console, unreadable)
        for label, network in networks.items()
    }
    kept = torch.tensor([place for place, name in enumerate(items.images) if name not in unreadable])
    items = items.take(kept)
    found = RetrievalMeasurements(
        origin, split, catalogue.attributes, device, dtype, failures=list(unreadable.values())
    )
    directions = torch.randn(count, RANDOM_DIMENSIONS, generator=torch.Generator().manual_seed(0))
    directions = nn.functional.normalize(directions, dim=1)[kept]
    for column, name in enumerate(catalogue.attributes):
        found.rows.append(MeasuredRetrieval(RANDOM, "", score(directions, items, column, name)))
    for label, network in networks.items():
        known = conditions_of(network)
        for condition in catalogue.attributes if known else ("",):
            space = spaces[label][kept, known.index(condition) if known else 0]
            for column, name in enumerate(catalogue.attributes):
                found.rows.append(MeasuredRetrieval(label, condition, score(space, items, column, name)))
    return found


def _opened(
    models: str | Path | nn.Module | Sequence[str | Path | nn.Module],
    device: str,
    dtype: str,
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Open networks, by label, and check that they embed images of that size."""
    networks = place(open_models(models, EMBEDDING_TASKS), device, dtype)
    for label, network in networks.items():
        check_embedding(network, label, input_config(network, image_size))
    return networks


def embed_images(
    model: nn.Module,
    store: ImageStore,
    names: Sequence[str],
    image_size: tuple[int, int] | None = None,
    batch_size: int = 64,
    console: Console | None = None,
) -> Tensor:
    """L2-normalised float32 embeddings (N, C, E) of images, on the CPU; C is 1 for a model without conditions.

    Raises:
        DataError: An image is missing or damaged.
        InputError: An embedding is not finite.
    """
    unreadable: dict[str, str] = {}
    found = _embed("The model", model, store, names, image_size, batch_size, console, unreadable)
    if unreadable:
        raise DataError(next(iter(unreadable.values())))
    return found


@torch.inference_mode()
def _embed(
    label: str,
    model: nn.Module,
    store: ImageStore,
    names: Sequence[str],
    image_size: tuple[int, int] | None,
    batch_size: int,
    console: Console | None,
    unreadable: dict[str, str],
) -> Tensor:
    """Like `embed_images`; adds the error of each unreadable image to `unreadable` and sets its row to 0."""
    transform = eval_transform(input_config(model, image_size))
    parameter = next(model.parameters(), torch.zeros(()))
    rows: list[int] = []
    found = []
    with counted("images", len(names), console) as advance:
        for start in range(0, len(names), batch_size):
            images: dict[int, Tensor] = {}
            for place, name in enumerate(names[start : start + batch_size], start):
                try:
                    if name not in unreadable:
                        images[place] = transform(store.open(name))
                except DataError as error:
                    unreadable[name] = str(error)
            if images:
                batch = torch.stack(list(images.values()))
                embeddings = embed(model, batch.to(parameter.device, parameter.dtype)).cpu()
                check_finite(embeddings, [names[place] for place in images], label)
                rows += images
                found.append(embeddings)
            advance(len(names[start : start + batch_size]))
    check_unreadable([unreadable[name] for name in names if name in unreadable], len(names))
    every = torch.zeros(len(names), *found[0].shape[1:])
    every[rows] = torch.cat(found)
    return every


@renamed_keywords(part="split")
def evaluate_triplets(
    models: str | Path | nn.Module | Sequence[str | Path | nn.Module],
    data: Triplets | str | Path,
    *,
    images: str | Path | None = None,
    split: str = "test",
    image_size: tuple[int, int] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "float32",
    console: Console | None = None,
    failures: list[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate models on triplets: for each model, the fraction of correct triplets per condition, and of all.

    Args:
        models: As in `evaluate_retrieval`; a model with conditions must have those of the triplets.
        data: Triplets, or the folder of Zappos (see `visionattn.data.retrieval.catalogue_files`).
        images: Folder or zip file of the images. Default: as in the layout.
        split: "train", "val" or "test".
        image_size: Height and width of the images. Default: that of each model.
        batch_size: Images per forward pass.
        device: Device of the models: "auto" (a GPU if available), "cpu" or "cuda:1".
        dtype: Precision of weights and activations.
        console: Console for a progress bar. Default: no progress bar.
        failures: Receives one line per image that could not be read; its triplets are left out.

    Raises:
        ConfigError: The split, device or dtype does not exist, or a model lacks a condition.
        CheckpointError: A weight file is unreadable or fits no model, or no weights are available for a name.
        DataError: A file is missing or damaged, or more than 10 % of the images are.
        InputError: A model gives no finite embeddings for images of that size.
    """
    given = data if isinstance(data, Triplets) else read_triplets(data, split, images)
    found: dict[str, dict[str, float]] = {}
    unreadable: dict[str, str] = {}
    device = str(find_device(device))
    for label, network in _opened(models, device, dtype, image_size).items():
        known = conditions_of(network)
        if known and (lacking := [name for name in given.conditions if name not in known]):
            raise ConfigError(f"{label} has no condition for {', '.join(lacking)}, only for {', '.join(known)}.")
        spaces = _embed(label, network, given.images, given.names, image_size, batch_size, console, unreadable)
        kept = torch.tensor([place for place, name in enumerate(given.names) if name not in unreadable])
        own = given.take(kept) if unreadable else given
        if not len(own.anchors):
            raise DataError(
                f"Every triplet has an image that cannot be read. First error: {next(iter(unreadable.values()))}"
            )
        columns = [known.index(name) for name in given.conditions] if known else [0]
        found[label] = score_triplets(spaces[kept][:, columns], own)
    if failures is not None:
        failures += unreadable.values()
    return found


def draw_matrix(path: str | Path, matrix: Tensor, names: Sequence[str]) -> None:
    """Write a matrix (C, C) of values in 0..1 as an image: rows are conditions, columns attributes; dark is high.

    Each column is shaded from its lowest to its highest value; numbers are in percent, and the diagonal is framed.

    Raises:
        ConfigError: There are more than 100 attributes.
        StorageError: The file could not be written.
    """
    count = len(names)
    if count > MOST:
        raise ConfigError(f"The image of a matrix can have at most {MOST} attributes; got {count}.")
    names = [shorten(name, 24) for name in names]
    picture = Image.new("RGB", (LABEL + CELL * count, LABEL + CELL * count), "white")
    draw: Any = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    shade = (matrix - matrix.amin(0)) / (matrix.amax(0) - matrix.amin(0)).clamp(min=1e-6)
    for row, name in enumerate(names):
        draw.text((LABEL - 8, LABEL + CELL * (row + 0.5)), name, fill="black", font=font, anchor="rm")
        heading = Image.new("RGB", (LABEL, CELL), "white")
        ImageDraw.Draw(heading).text((8, CELL / 2), name, fill="black", font=font, anchor="lm")
        picture.paste(heading.rotate(90, expand=True), (LABEL + CELL * row, 0))
        for column in range(count):
            left, top, dark = LABEL + CELL * column, LABEL + CELL * row, shade[row, column].item()
            colour = tuple(round(255 + dark * (end - 255)) for end in (20, 60, 120))
            frame = "darkorange" if row == column else None
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=colour, outline=frame, width=3)
            text = f"{100 * matrix[row, column].item():.1f}"
            middle = (left + CELL / 2, top + CELL / 2)
            draw.text(middle, text, fill="white" if dark > 0.5 else "black", font=font, anchor="mm")
    with atomic_path(path) as temporary:
        picture.save(temporary)


def triplet_table(found: dict[str, dict[str, float]]) -> Table:
    """One row per model and one column per condition, in percent."""
    names: Iterable[str] = next(iter(found.values()), {})
    table = _table_of("model", *names)
    for model, shares in found.items():
        table.add_row(Text(shorten(Path(model).name)), *(f"{100 * share:.1f}" for share in shares.values()))
    return table


def _table_of(*columns: str) -> Table:
    """A table whose column names may contain characters that rich would read as markup."""
    table = Table()
    for column in columns:
        table.add_column(Text(shorten(column)))
    return table
