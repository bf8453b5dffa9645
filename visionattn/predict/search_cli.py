"""`visionattn index FOLDER OUT` and `visionattn search INDEX IMAGE`: images found by one attribute, or several."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table
from torch import nn

from visionattn.checkpoints import load
from visionattn.errors import InputError, VisionAttnError
from visionattn.files import atomic_path
from visionattn.predict.image_index import Hit, ImageIndex, build_index, read_upright
from visionattn.predict.opening import WEIGHT_FILES, pretrained
from visionattn.predict.picture import WRITABLE

__all__ = ["add_index_arguments", "add_search_arguments", "contact_sheet", "run_index", "run_search"]

THUMBNAIL, CAPTION, GAP, COLUMNS = 180, 36, 8, 6  # pixels, and images a row


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn index`."""
    parser.add_argument("folder", help="images, also in sub-folders")
    parser.add_argument("output", help="folder of the index; an unfinished one is continued")
    parser.add_argument("--model", required=True, metavar="NAME|FILE", help="name with weights, or weight file")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of images (default: the model's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an index of other images or another model")


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn search`."""
    parser.add_argument("index", help="folder that visionattn index wrote")
    parser.add_argument("image", help="image to find the like of")
    parser.add_argument(
        "--attribute", required=True, metavar="NAME[=WEIGHT],...", help="colour, or a mix: colour=1,kind=0.5"
    )
    parser.add_argument("--top", type=int, default=12, help="images to find (default: 12)")
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
    size = tuple(args.image_size) if args.image_size else None
    failures = build_index(
        args.folder,
        args.output,
        _open(args.model),
        str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        image_size=size,
        overwrite=args.overwrite,
        console=console if console.is_terminal else None,
    )
    index = ImageIndex(args.output)
    console.print(f"{args.output}: {len(index.images)} images, to be searched by {', '.join(index.conditions)}")
    for failure in failures:
        print(f"visionattn: {failure}", file=sys.stderr)
    return int(bool(failures))


def run_search(args: argparse.Namespace) -> int:
    """Run `visionattn search`.

    Returns:
        0.

    Raises:
        VisionAttnError: Nothing could be searched or written.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    attributes = _weights(args.attribute)
    index = ImageIndex(args.index)
    index.check_attributes(attributes)
    described = args.output.with_suffix(".json")
    if args.output.suffix.lower() not in WRITABLE:
        raise InputError(f"Cannot write {args.output}: its suffix is none of {', '.join(WRITABLE)}.")
    if args.top < 1:
        raise InputError(f"--top is {args.top}; it is 1 or more.")
    if taken := [path for path in (args.output, described) if path.exists() and not args.overwrite]:
        raise InputError(f"{taken[0]} exists: give --overwrite to replace it.")
    query = read_upright(Path(args.image))
    name = args.model or index.manifest["model"]
    model = _open(name)
    index.check(model, name)
    hits = index.search(index.embed(model, query), attributes, args.top)
    _report(console, hits, attributes)
    with atomic_path(args.output) as temporary:
        contact_sheet(query, hits, Path(index.manifest["folder"])).save(temporary)
    found = [{"image": hit.image, "score": hit.score, "cosines": hit.cosines} for hit in hits]
    content = {"query": args.image, "index": args.index, "folder": index.manifest["folder"], "attributes": attributes}
    with atomic_path(described) as temporary:
        temporary.write_text(json.dumps({**content, "hits": found}, indent=1))
    console.print(f"wrote {args.output} and {described}", soft_wrap=True, highlight=False)
    return 0


def _open(name: str) -> nn.Module:
    path = Path(name)
    model = load(path) if path.exists() or path.suffix.lower() in WEIGHT_FILES else pretrained(name)
    return model.cuda() if torch.cuda.is_available() else model


def _weights(text: str) -> dict[str, float]:
    """`colour=1,kind=0.5` -> the weight of each attribute; 1 where none is said."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            found[name.strip()] = float(weight or 1)
        except ValueError as error:
            raise InputError(f"--attribute is {text!r}: {weight!r} is no number.") from error
        if not math.isfinite(found[name.strip()]):
            raise InputError(f"--attribute is {text!r}: {weight!r} is no weight.")
    return found


def _report(console: Console, hits: list[Hit], attributes: dict[str, float]) -> None:
    table = Table("image", "score", *(attributes if len(attributes) > 1 else ()))
    for hit in hits:
        cosines = (f"{hit.cosines[name]:.3f}" for name in attributes) if len(attributes) > 1 else ()
        table.add_row(hit.image, f"{hit.score:.3f}", *cosines)
    console.print(table)


def contact_sheet(query: Image.Image, hits: list[Hit], folder: Path) -> Image.Image:
    """A picture of the query, framed, and what was found, best first; grey stands for an image that is gone."""
    cells = [(query, "query")]
    for hit in hits:
        try:
            image = read_upright(folder / hit.image)
        except VisionAttnError:
            image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
        cells.append((image, f"{hit.score:.3f}  {Path(hit.image).name}"))
    columns = min(COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    width, height = THUMBNAIL + GAP, THUMBNAIL + CAPTION
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for number, (image, caption) in enumerate(cells):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        thumbnail = ImageOps.contain(image, (THUMBNAIL, THUMBNAIL))
        sheet.paste(thumbnail, (left + (THUMBNAIL - thumbnail.width) // 2, top + (THUMBNAIL - thumbnail.height) // 2))
        if number == 0:
            draw.rectangle((left - 3, top - 3, left + THUMBNAIL + 2, top + THUMBNAIL + 2), outline="black", width=3)
        while draw.textlength(caption, font) > THUMBNAIL and len(caption) > 1:
            caption = caption[:-1]
        draw.text((left, top + THUMBNAIL + 6), caption, fill="black", font=font)
    return sheet
