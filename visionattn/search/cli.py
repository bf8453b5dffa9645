"""`visionattn index FOLDER`, `search INDEX IMAGE` and `duplicates INDEX`: similar images, by any model."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from visionattn.arguments import call_with, number, whole_number
from visionattn.data.images import list_images
from visionattn.data.retrieval.embedding import LARGEST
from visionattn.errors import InputError, shorten
from visionattn.search.api import INDEX, Hits, index, search
from visionattn.search.duplicates import THRESHOLD, duplicates
from visionattn.search.nearest import KINDS
from visionattn.search.sheet import contact_sheet

__all__ = [
    "add_duplicates_arguments",
    "add_index_arguments",
    "add_search_arguments",
    "contact_sheet",
    "run_duplicates",
    "run_index",
    "run_search",
]

SHOWN = 20  # groups of duplicates in the terminal; the page shows all


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn index`."""
    parser.add_argument("folder", help="folder of images; sub-folders are included")
    parser.add_argument(
        "output",
        nargs="?",
        default=INDEX,
        help="folder of the index; an existing index is updated (default: %(default)s)",
    )
    parser.add_argument("--model", required=True, metavar="NAME|FILE", help="timm model name, or weight file")
    parser.add_argument("--checkpoint", metavar="FILE", help="weight file for the model name")
    parser.add_argument(
        "--image-size",
        type=whole_number(1, LARGEST),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images in pixels (default: the model's input size)",
    )
    parser.add_argument(
        "--nearest", choices=KINDS, default="auto", help="kind of search (default: auto, exact below 200,000 images)"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")
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
        "--attribute",
        metavar="NAME[=WEIGHT],...",
        help="attribute, or a weighted mix: colour=1,kind=0.5 (default: the only one of the index)",
    )
    parser.add_argument("--top", type=whole_number(1), default=12, help="number of images to find (default: 12)")
    parser.add_argument(
        "--include-query", action="store_true", help="also find the query image itself and copies of it in the index"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="current folder of the indexed images (default: as recorded in the index)"
    )
    parser.add_argument(
        "--model", metavar="NAME|FILE", help="model that made the index (default: as recorded in the index)"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weight file for the model name")
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--rerank", metavar="FILE", help="checkpoint of RerankTask; re-ranks the 50 nearest images by their patches"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("search.png"),
        help="contact sheet, an image or .html page; a JSON file is written next to it (default: search.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")


def add_duplicates_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `visionattn duplicates`."""
    parser.add_argument("index", help="folder that visionattn index wrote")
    parser.add_argument("--attribute", metavar="NAME", help="attribute to compare (default: the only one of the index)")
    parser.add_argument(
        "--threshold",
        type=number(0, 1, above=True),
        default=THRESHOLD,
        metavar="COSINE",
        help="minimum cosine similarity of two near-duplicates (default: %(default)s)",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="current folder of the indexed images (default: as recorded in the index)"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("duplicates.html"),
        help="HTML page of the groups, with a JSON file next to it, or a .json file (default: duplicates.html)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")


def run_index(args: argparse.Namespace) -> int:
    """Run `visionattn index`.

    Returns:
        0, or 1 if some images could not be read; each is named on stderr.

    Raises:
        VisionAttnError: The index could not be built.
    """
    size = None if args.image_size is None else tuple(args.image_size)
    found = index(
        args.folder,
        args.output,
        args.model,
        checkpoint=args.checkpoint,
        image_size=size,
        nearest=args.nearest,
        device=args.device,
        overwrite=args.overwrite,
    )
    assert found.update is not None
    console = Console(highlight=False, markup=False, soft_wrap=True)
    attributes = ", ".join(map(shorten, found.conditions))
    console.print(f"{shorten(args.output)}: {len(found.images)} images, searchable by {attributes}")
    console.print(str(found.update))
    if left_out := list_images(args.folder, recursive=True).describe_left_out():
        print(f"visionattn: note: {shorten(args.folder)}: left out {left_out}.", file=sys.stderr)
    failures = found.update.failures
    for failure in failures:
        print(f"visionattn: {shorten(failure, 300)}", file=sys.stderr)
    if failures:
        print(f"visionattn: {len(failures)} images could not be read and are not in the index.", file=sys.stderr)
    return int(bool(failures))


def run_search(args: argparse.Namespace) -> int:
    """Run `visionattn search`.

    Returns:
        0.

    Raises:
        VisionAttnError: The search failed, or an output could not be written.
    """
    hits = search(
        args.index,
        args.image,
        None if args.attribute is None else _weights(args.attribute),
        top=args.top,
        include_query=args.include_query,
        images=args.images,
        model=args.model,
        checkpoint=args.checkpoint,
        device=args.device,
        rerank=args.rerank,
        output=args.output,
        overwrite=args.overwrite,
    )
    # Names of files and attributes may look like markup.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(_table(hits))
    for note in hits.notes:
        print(f"visionattn: note: {note}", file=sys.stderr)
    described = args.output.with_suffix(".json")
    console.print(f"wrote {shorten(args.output)} and {shorten(described)}", soft_wrap=True)
    return 0


def run_duplicates(args: argparse.Namespace) -> int:
    """Run `visionattn duplicates`.

    Returns:
        0.

    Raises:
        VisionAttnError: The comparison failed, or an output could not be written.
    """
    found = call_with(duplicates, args)
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    if found.groups:
        table = Table("images", "group")
        for names in found.groups[:SHOWN]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            table.add_row(str(len(names)), ", ".join(shorten(name) for name in names[:3]) + more)
        console.print(table)
    more = f" ({SHOWN} groups are shown)" if len(found.groups) > SHOWN else ""
    console.print(f"cosine of at least {found.threshold:g}: {found.describe()}{more}", soft_wrap=True)
    console.print(found.describe_usual(), soft_wrap=True)
    described = args.output.with_suffix(".json")
    console.print(
        f"wrote {' and '.join(shorten(path) for path in dict.fromkeys((args.output, described)))}", soft_wrap=True
    )
    return 0


def _weights(text: str) -> dict[str, float]:
    """Parse `colour=1,kind=0.5` into the weight of each attribute; the default weight is 1."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        name = name.strip()
        if name in found:
            raise InputError(f"--attribute is {shorten(text)!r}: {shorten(name)!r} is given twice.")
        try:
            found[name] = float(weight or 1)
        except ValueError as error:
            raise InputError(f"--attribute is {shorten(text)!r}: {shorten(weight)!r} is not a number.") from error
        if not math.isfinite(found[name]):
            raise InputError(f"--attribute is {shorten(text)!r}: {shorten(weight)!r} is not finite.")
    return found


def _table(hits: Hits) -> Table:
    several = list(hits.attributes) if len(hits.attributes) > 1 else []
    table = Table("image", "score", *map(shorten, several))
    for hit in hits:
        table.add_row(shorten(hit.image), f"{hit.score:.3f}", *(f"{hit.cosines[name]:.3f}" for name in several))
    return table
