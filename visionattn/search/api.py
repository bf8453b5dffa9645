"""`visionattn.index` and `visionattn.search`: the commands of the same names as functions."""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from visionattn.data.retrieval.embedding import EMBEDDING_TASKS, check_config, conditions_of, input_config
from visionattn.devices import find_device
from visionattn.errors import InputError, shorten
from visionattn.files import atomic_path, check_output
from visionattn.opening import open_model
from visionattn.predict.images.picture import WRITABLE
from visionattn.progress import new_console
from visionattn.search import sheet
from visionattn.search.building import as_upright, read_upright, update_index
from visionattn.search.image_index import Hit, ImageIndex
from visionattn.search.reranking import RERANKED, Reranker

__all__ = ["INDEX", "Hits", "index", "search"]

INDEX = "index"  # default output folder of `index`


def index(
    folder: str | Path,
    output: str | Path = INDEX,
    model: str | Path | nn.Module | None = None,
    *,
    checkpoint: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    nearest: str = "auto",
    device: str | torch.device = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> ImageIndex:
    """Embed the images of a folder with a model, and write an index of them or update an existing one.

    An attribute model gives one embedding per attribute; any other model gives its features, under the attribute
    "image". A classifier's head is removed.

    Args:
        folder: Folder of images; sub-folders are included.
        output: Folder of the index. An index of the same folder and model is updated: images are added, removed and
            refreshed. An unfinished index is continued.
        model: Required. A timm model name with weights, a weight file or folder, or a module (see
            `visionattn.opening.open_model`), which is not changed.
        checkpoint: Weight file for a model name.
        image_size: Side of the images in pixels, or (height, width); None: the model's input size.
        nearest: How search finds the nearest images: "exact", approximately with "hnsw" or "ivf" (see
            `visionattn.search.nearest`), or "auto": exact below 200,000 images.
        device: "auto" (a GPU if available), or a PyTorch device.
        overwrite: Replace an index of another folder or model, and compare images by content, not by size and time.
        progress: Show the progress in a terminal or notebook.

    Returns:
        The index. Its `update` states what changed and which images could not be read.

    Raises:
        CheckpointError: The model's weights could not be read, or are not finite.
        DataError: There are no images, or none can be read, or more than 10 % cannot be read.
        InputError: No model is given, it gives no finite embeddings at that size, the output holds another index, or
            the device does not exist.
        MissingPackageError: faiss is not installed.
        StorageError: The index could not be written, or another run is writing to it.
        UnknownNameError: No model has that name.
    """
    if model is None:
        raise InputError("model is missing: give a timm model name with weights, a weight file or a module.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    network = _open(model, device, checkpoint, size)
    update = update_index(
        folder,
        output,
        network,
        _name(model),
        checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
        image_size=size,
        nearest=nearest,
        overwrite=overwrite,
        console=new_console() if progress else None,
    )
    found = ImageIndex(output)
    found.model, found.update = network, update
    return found


class Hits(list[Hit]):
    """Results of a search, best first; a notebook shows them as a contact sheet.

    Attributes:
        attributes: Weight of each attribute of the search.
        query: The query image.
        folder: Folder of the indexed images.
        left_out: Indexed images that are the query itself or copies of it, which are not among the hits.
        notes: Remarks for the user, such as on images that have changed since they were indexed.
    """

    def __init__(
        self, hits: Iterable[Hit], attributes: dict[str, float], query: Image.Image, folder: Path, left_out: list[str]
    ) -> None:
        super().__init__(hits)
        self.attributes, self.query, self.folder, self.left_out = attributes, query, folder, left_out
        self.notes: list[str] = []

    def contact_sheet(self) -> Image.Image:
        """Draw the query, framed, and the hits, best first, as one image; missing images are grey."""
        return sheet.contact_sheet(self.query, self, self.folder)

    def to_html(self) -> str:
        """Return the contact sheet as a self-contained HTML page without scripts."""
        several = len(self.attributes) > 1
        searched = [f"{shorten(name)}{f' x {weight:g}' * several}" for name, weight in self.attributes.items()]
        found = [sheet.Cell(hit.image, f"{hit.score:.3f}") for hit in self]
        told = [f"{len(self)} images of {shorten(self.folder)}, best first, by {', '.join(searched)}.", *self.notes]
        groups = {"Query": [sheet.Cell(self.query, "query")], "Found": found}
        return sheet.page("Images found", told, groups, self.folder)

    def to_json(self) -> dict[str, Any]:
        """Return the search and its hits as a JSON-compatible dictionary."""
        return {
            "folder": str(self.folder),
            "attributes": self.attributes,
            "left_out": self.left_out,
            "hits": [{"image": hit.image, "score": hit.score, "cosines": hit.cosines} for hit in self],
        }

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.contact_sheet().save(file, "PNG")
            return file.getvalue()


def search(
    index: str | Path | ImageIndex,
    image: str | Path | Image.Image | np.ndarray,
    attributes: str | Sequence[str] | Mapping[str, float] | None = None,
    *,
    top: int = 12,
    include_query: bool = False,
    images: str | Path | None = None,
    model: str | Path | nn.Module | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "auto",
    rerank: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Hits:
    """Find the images of an index that are most similar to a query image, by attributes such as colour.

    Args:
        index: Folder that `visionattn.index` wrote, or the index itself, which keeps the model for the next search.
        image: Query image: a file, a PIL image, or an array (H, W) or (H, W, C) of uint8 or uint16 with 1 to 4
            channels.
        attributes: An attribute, several of equal weight, or the weight of each; None: the only one of the index.
        top: Maximum number of hits.
        include_query: Also find the query image itself and copies of it in the index. A query that is not a file has
            no copies.
        images: Current folder of the indexed images; None: the folder that was indexed.
        model: The model that made the index; None: the model recorded in the index.
        checkpoint: Weight file for a model name.
        device: "auto" (a GPU if available), or a PyTorch device.
        rerank: Checkpoint of `RerankTask`. Its pair encoder reads the 50 nearest images, compares their patches with
            those of the query and re-orders them; scores are then its own, from 0 to 1. The index must have been made
            with the model that it was trained with, and have one attribute.
        output: Contact sheet to write, an image or an HTML page, with a JSON file of the same name; None writes
            nothing.
        overwrite: Replace existing outputs.

    Returns:
        Hits, best first; hits of equal score in the order of the index.

    Raises:
        CheckpointError: The model is not the one that made the index, or could not be read.
        DataError: There is no index, it is damaged, or the query image cannot be read.
        InputError: An argument is invalid, or an output exists.
        MissingPackageError: faiss is not installed.
        StorageError: An output could not be written.
        UnknownNameError: There is no such attribute, or no such model.
    """
    opened = index if isinstance(index, ImageIndex) else ImageIndex(index)
    weights = _weights(attributes, opened)
    opened.check_attributes(weights)
    file = image if isinstance(image, (str, Path)) else None
    if output is not None:
        _check_outputs(Path(output), file, overwrite)
    reranker = None if rerank is None else Reranker(rerank)
    if reranker is not None:
        reranker.check(opened, top)
    query = read_upright(image) if isinstance(image, (str, Path)) else as_upright(image)
    network = _model_of(opened, model, device, checkpoint)
    copies = [] if include_query or file is None else opened.copies_of(file)
    folder = Path(images or opened.manifest["folder"])
    found = opened.search(opened.embed(network, query), weights, top if reranker is None else RERANKED, copies)
    unreadable: list[str] = []
    if reranker is not None:
        found, unreadable = reranker.rerank(opened, network, query, found, folder)
    hits = Hits(found[:top], weights, query, folder, [opened.images[position] for position in copies])
    hits.notes = _notes(opened, network, hits)
    if unreadable:
        first = shorten(unreadable[0])
        hits.notes.append(f"{len(unreadable)} of the nearest images could not be read, such as {first}: left out.")
    if output is not None:
        with atomic_path(output) as temporary:
            if temporary.suffix.lower() == sheet.PAGE:
                temporary.write_text(hits.to_html(), encoding="utf-8")
            else:
                hits.contact_sheet().save(temporary)
        named = {"query": None if file is None else str(file), "index": str(opened.folder)}
        with atomic_path(Path(output).with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps({**named, **hits.to_json()}, indent=1))
    return hits


def _open(
    model: str | Path | nn.Module,
    device: str | torch.device,
    checkpoint: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Open the model that embeds images; the head of a classifier is removed."""
    found: Any = open_model(
        model, checkpoint, task=EMBEDDING_TASKS, image_size=image_size, drop_classifier=checkpoint is not None
    ).model
    if not conditions_of(found) and getattr(found, "num_classes", None) and hasattr(found, "reset_classifier"):
        found = copy.deepcopy(found) if found is model else found
        found.reset_classifier(0)
    return found.to(find_device(device))


def _name(model: str | Path | nn.Module) -> str:
    """Name of a model in a manifest; for a file, its absolute path."""
    if isinstance(model, nn.Module):
        return type(model).__name__
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def _model_of(
    index: ImageIndex,
    model: str | Path | nn.Module | None,
    device: str | torch.device,
    checkpoint: str | Path | None,
) -> nn.Module:
    """Open the model of an index, and keep it in the index for the next search.

    Raises:
        CheckpointError: Its weights are not those that made the index.
    """
    if model is not None or checkpoint is not None or index.model is None:
        named = index.manifest["model"] if model is None else model
        if model is None and checkpoint is None:
            checkpoint = index.manifest.get("checkpoint")
        check_config(index.manifest["input"])
        opened = _open(named, device, checkpoint, tuple(index.manifest["input"]["size"]))
        index.check(opened, named if isinstance(named, str) else _name(named))
        index.model = opened
    elif device != "auto":
        index.model.to(find_device(device))
    return index.model


def _weights(attributes: str | Sequence[str] | Mapping[str, float] | None, index: ImageIndex) -> dict[str, float]:
    if attributes is None:
        if len(index.conditions) > 1:
            raise InputError(
                f"{shorten(index.folder)} has the attributes {', '.join(map(shorten, index.conditions))}: choose with "
                "--attribute."
            )
        return dict.fromkeys(index.conditions, 1.0)
    if isinstance(attributes, Mapping):
        return dict(attributes)
    names = [attributes] if isinstance(attributes, str) else list(attributes)
    return dict.fromkeys(names, 1.0)


def _check_outputs(output: Path, image: str | Path | None, overwrite: bool) -> None:
    described = output.with_suffix(".json")
    check_output(output, overwrite, (*WRITABLE, sheet.PAGE))
    check_output(described, overwrite)
    if image is not None and os.path.realpath(image) in map(os.path.realpath, (output, described)):
        raise InputError(f"The output would replace the query image {shorten(image)}: give another --output.")


def _notes(index: ImageIndex, model: nn.Module, hits: Hits) -> list[str]:
    """Remarks for the user on the hits of a search."""
    notes, folder = [], hits.folder
    if hits.left_out:
        first = shorten(hits.left_out[0])
        count = len(hits.left_out) - 1
        more = f" and {count} {'copy' if count == 1 else 'copies'}" if count else ""
        notes.append(f"the query itself is in the index ({first}{more}) and left out; --include-query finds it too.")
    known = {name: (size, time) for name, size, time in index.manifest.get("files", [])}
    found: list[tuple[int, int] | None] = []
    for hit in hits:
        try:
            status = (folder / hit.image).stat()
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    if hits and not os.path.isdir(folder):
        notes.append(
            f"the image folder {shorten(folder)} no longer exists: give its new path with --images FOLDER, or run "
            "visionattn index on it again."
        )
    elif gone := found.count(None):
        notes.append(f"{gone} of the images found are no longer in {shorten(folder)}: run visionattn index again.")
    changed = sum(now is not None and now != known.get(hit.image, now) for hit, now in zip(hits, found))
    if changed:
        notes.append(f"{changed} of the images found have changed since they were indexed: run visionattn index again.")
    if len(hits) > sheet.SHOWN:
        notes.append(f"the contact sheet shows the first {sheet.SHOWN} of {len(hits)} images; the JSON file lists all.")
    own, prepared = input_config(model), index.manifest["input"]
    # Versions that write checksums take the image size from the checkpoint, or from the user.
    if "checksums" not in index.manifest and own != prepared:
        notes.append(
            f"the images were indexed at {prepared.get('size')} pixels, but the model's input size is {own['size']}: "
            "index them again with --overwrite."
        )
    return notes
