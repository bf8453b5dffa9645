"""`visionattn index FOLDER OUT` and `visionattn search INDEX IMAGE`: images found by one attribute, or several."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import nn

from visionattn.arguments import whole_number
from visionattn.data.images import list_images
from visionattn.data.retrieval.embedding import EMBEDDING_TASKS, LARGEST, input_config
from visionattn.errors import InputError, VisionAttnError, shorten
from visionattn.files import atomic_path, check_output
from visionattn.opening import open_model
from visionattn.predict.images.picture import WRITABLE
from visionattn.search.building import read_upright, update_index
from visionattn.search.image_index import Hit, ImageIndex

__all__ = ["add_index_arguments", "add_search_arguments", "contact_sheet", "run_index", "run_search"]

THUMBNAIL, CAPTION, GAP, COLUMNS = 180, 36, 8, 6  # pixels, and images a row
SHOWN = 75 * COLUMNS - 1  # hits on a picture beside the query: WebP ends at 16,383 pixels


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn index`."""
    parser.add_argument("folder", help="images, also in sub-folders")
    parser.add_argument("output", help="folder of the index; an existing one is brought up to date")
    parser.add_argument("--model", required=True, metavar="NAME|FILE", help="name with weights, or weight file")
    parser.add_argument(
        "--image-size",
        type=whole_number(1, LARGEST),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of images (default: the model's)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an index of another folder or model, and compare images by content, not by size and time",
    )


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn search`."""
    parser.add_argument("index", help="folder that visionattn index wrote")
    parser.add_argument("image", help="query image")
    parser.add_argument(
        "--attribute", required=True, metavar="NAME[=WEIGHT],...", help="colour, or a mix: colour=1,kind=0.5"
    )
    parser.add_argument("--top", type=whole_number(1), default=12, help="images to find (default: 12)")
    parser.add_argument(
        "--include-query", action="store_true", help="also find the query image itself and copies of it in the index"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="where the indexed images are now (default: where they were)"
    )
    parser.add_argument(
        "--model", metavar="NAME|FILE", help="the model that made the index (default: where it was then)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("search.png"), help="picture of what was found, JSON beside it (search.png)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def run_index(args: argparse.Namespace) -> int:
    """Run `visionattn index`.

    Returns:
        0, or 1 where some images could not be read; each is named on the error output.

    Raises:
        VisionAttnError: There is no index.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    update = update_index(
        args.folder,
        args.output,
        _open(args.model),
        str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        image_size=tuple(args.image_size) if args.image_size else None,
        overwrite=args.overwrite,
        console=console,
    )
    index = ImageIndex(args.output)
    attributes = ", ".join(map(shorten, index.conditions))
    console.print(f"{shorten(args.output)}: {len(index.images)} images, to be searched by {attributes}")
    changes = {"added": update.added, "refreshed": update.refreshed, "removed": update.removed}
    console.print(", ".join(f"{len(names)} {what}" for what, names in changes.items()))
    if left_out := list_images(args.folder, recursive=True).describe_left_out():
        print(f"visionattn: note: {shorten(args.folder)}: left out {left_out}.", file=sys.stderr)
    for failure in update.failures:
        print(f"visionattn: {shorten(failure, 300)}", file=sys.stderr)
    if update.failures:
        print(
            f"visionattn: {len(update.failures)} images could not be read; the index is without them.", file=sys.stderr
        )
    return int(bool(update.failures))


def run_search(args: argparse.Namespace) -> int:
    """Run `visionattn search`.

    Returns:
        0.

    Raises:
        VisionAttnError: Nothing could be searched or written.
    """
    # Names of files and attributes may look like markup.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    attributes = _weights(args.attribute)
    index = ImageIndex(args.index)
    index.check_attributes(attributes)
    described = args.output.with_suffix(".json")
    check_output(args.output, args.overwrite, tuple(WRITABLE))
    check_output(described, args.overwrite)
    if os.path.realpath(args.image) in map(os.path.realpath, (args.output, described)):
        raise InputError(f"The output would replace the query image {shorten(args.image)}. Name another --output.")
    query = read_upright(args.image)
    name = index.manifest["model"] if args.model is None else args.model
    model = _open(name)
    index.check(model, name)
    copies = [] if args.include_query else index.copies_of(args.image)
    hits = index.search(index.embed(model, query), attributes, args.top, copies)
    _report(console, hits, attributes)
    folder = Path(args.images or index.manifest["folder"])
    for note in _notes(index, model, hits, copies, folder):
        print(f"visionattn: note: {note}", file=sys.stderr)
    with atomic_path(args.output) as temporary:
        contact_sheet(query, hits[:SHOWN], folder).save(temporary)
    found = [{"image": hit.image, "score": hit.score, "cosines": hit.cosines} for hit in hits]
    content = {"query": args.image, "index": args.index, "folder": str(folder), "attributes": attributes}
    content["left_out"] = [index.images[position] for position in copies]
    with atomic_path(described) as temporary:
        temporary.write_text(json.dumps({**content, "hits": found}, indent=1))
    console.print(f"wrote {shorten(args.output)} and {shorten(described)}", soft_wrap=True)
    return 0


def _open(name: str) -> nn.Module:
    """The model that embeds images, on a GPU where there is one."""
    model = open_model(name, task=EMBEDDING_TASKS).model
    return model.cuda() if torch.cuda.is_available() else model


def _notes(index: ImageIndex, model: nn.Module, hits: list[Hit], copies: list[int], folder: Path) -> list[str]:
    """What is worth knowing of a search beside its hits."""
    notes = []
    if copies:
        first = shorten(index.images[copies[0]])
        more = f" and {len(copies) - 1} copies" if len(copies) > 1 else ""
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
            f"the folder of the images, {shorten(folder)}, is gone. Say where they are now by --images FOLDER, or run "
            "visionattn index on that folder again."
        )
    elif gone := found.count(None):
        notes.append(f"{gone} of the images found are no longer in {shorten(folder)}: run visionattn index again.")
    changed = sum(now is not None and now != known.get(hit.image, now) for hit, now in zip(hits, found))
    if changed:
        notes.append(f"{changed} of the images found have changed since they were indexed: run visionattn index again.")
    if len(hits) > SHOWN:
        notes.append(f"the picture shows the first {SHOWN} of {len(hits)} images; the JSON file names all.")
    own, prepared = input_config(model), index.manifest["input"]
    # Indexes with checksums were made by versions that take the image size from the checkpoint, or were told another.
    if "checksums" not in index.manifest and own != prepared:
        notes.append(
            f"the images were indexed at {prepared.get('size')} pixels, the model is made for {own['size']}: index "
            "them again with --overwrite."
        )
    return notes


def _weights(text: str) -> dict[str, float]:
    """`colour=1,kind=0.5` -> the weight of each attribute; 1 where none is said."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        name = name.strip()
        if name in found:
            raise InputError(f"--attribute is {shorten(text)!r}: {shorten(name)!r} stands there twice.")
        try:
            found[name] = float(weight or 1)
        except ValueError as error:
            raise InputError(f"--attribute is {shorten(text)!r}: {shorten(weight)!r} is no number.") from error
        if not math.isfinite(found[name]):
            raise InputError(f"--attribute is {shorten(text)!r}: {shorten(weight)!r} is no weight.")
    return found


def _report(console: Console, hits: list[Hit], attributes: dict[str, float]) -> None:
    several = list(attributes) if len(attributes) > 1 else []
    table = Table("image", "score", *map(shorten, several))
    for hit in hits:
        table.add_row(shorten(hit.image), f"{hit.score:.3f}", *(f"{hit.cosines[name]:.3f}" for name in several))
    console.print(table)


def contact_sheet(query: Image.Image, hits: list[Hit], folder: Path) -> Image.Image:
    """A picture of the query, framed, and what was found, best first; grey stands for an image that is gone."""
    cells = [(_thumbnail(query), "query")]
    for hit in hits:
        try:
            image = _thumbnail(read_upright(folder / hit.image))
        except VisionAttnError:
            image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
        cells.append((image, f"{hit.score:.3f}  {shorten(Path(hit.image).name)}"))
    columns = min(COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    width, height = THUMBNAIL + GAP, THUMBNAIL + CAPTION
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for number, (thumbnail, caption) in enumerate(cells):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        sheet.paste(thumbnail, (left + (THUMBNAIL - thumbnail.width) // 2, top + (THUMBNAIL - thumbnail.height) // 2))
        if number == 0:
            draw.rectangle((left - 3, top - 3, left + THUMBNAIL + 2, top + THUMBNAIL + 2), outline="black", width=3)
        while draw.textlength(caption, font) > THUMBNAIL and len(caption) > 1:
            caption = caption[:-1]
        draw.text((left, top + THUMBNAIL + 6), caption, fill="black", font=font)
    return sheet


def _thumbnail(image: Image.Image) -> Image.Image:
    share = THUMBNAIL / max(image.size)
    return image.resize((max(1, round(share * image.width)), max(1, round(share * image.height))))
