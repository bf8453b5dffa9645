"""`visionattn evaluate sr|stereo|retrieval MODEL_OR_CHECKPOINT... --data DATA`: benchmark protocols."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from visionattn.arguments import add_old_spelling, number, whole_number
from visionattn.data.images import SUFFIXES, list_images
from visionattn.data.matching.stereo import LAYOUTS
from visionattn.data.retrieval import catalogue_files
from visionattn.data.retrieval.embedding import LARGEST as LARGEST_SIDE
from visionattn.errors import ConfigError, shorten
from visionattn.evaluate import retrieval
from visionattn.evaluate.opening import DTYPES
from visionattn.evaluate.sr import Measurements, evaluate_sr
from visionattn.evaluate.stereo import BASELINES, StereoMeasurements, evaluate_stereo
from visionattn.files import check_output
from visionattn.models.enlarged import LARGEST

__all__ = ["add_arguments", "add_factor", "factors", "run"]

ZAPPOS = "zappos"
MOST_FACTOR = 65535  # with a larger one, a 16-bit PNG could not store a disparity of one pixel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the protocols and their arguments."""
    protocols = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    sr = protocols.add_parser("sr", help="super-resolution: PSNR and SSIM on Y, compared with bicubic")
    sr.add_argument(
        "models",
        nargs="*",
        metavar="MODEL_OR_CHECKPOINT",
        help="pretrained model names or weight files (default: bicubic only)",
    )
    sr.add_argument("--data", required=True, metavar="FOLDER", help="high-resolution images")
    sr.add_argument(
        "--low-resolution",
        metavar="FOLDER",
        help="low-resolution images of the same names (default: MATLAB's bicubic downscaling of --data)",
    )
    add_old_spelling(sr, "--lr", "--low-resolution")
    sr.add_argument(
        "--scale", type=whole_number(1, 64), metavar="R", help="upscaling factor (default: that of the models)"
    )
    sr.add_argument(
        "--jpeg",
        type=whole_number(1, 100),
        metavar="Q",
        help="compress the low-resolution images to JPEG of this quality first (default: no JPEG)",
    )
    pairs = protocols.add_parser("stereo", help="stereo: end-point error, bad pixels and D1, on all and non-occluded")
    pairs.add_argument(
        "models",
        nargs="*",
        metavar="MODEL_OR_CHECKPOINT",
        help="pretrained model names or weight files (default: --baseline only)",
    )
    pairs.add_argument("--data", required=True, nargs="+", metavar="FOLDER", help="data sets or single scenes")
    pairs.add_argument("--layout", choices=LAYOUTS, help="layout of the folders (default: detected)")
    add_factor(pairs)
    pairs.add_argument(
        "--baseline",
        choices=tuple(BASELINES),
        help="also evaluate OpenCV's semi-global matching, raw and with gaps filled",
    )
    pairs.add_argument(
        "--enlarge", type=number(1, LARGEST), default=1.0, metavar="S", help="enlarge the views by S before matching"
    )
    pairs.add_argument(
        "--fill",
        action="store_true",
        help="replace disparities that fail the left-right consistency check, and smooth all; needs OpenCV",
    )
    ranked = protocols.add_parser("retrieval", help="retrieval by attributes: mAP, recall, entanglement, triplets")
    ranked.add_argument(
        "models",
        nargs="*",
        metavar="MODEL_OR_CHECKPOINT",
        help="pretrained model names or weight files (default: random embeddings only)",
    )
    ranked.add_argument("--data", required=True, metavar="PATH", help="CSV table or folder of a data set")
    ranked.add_argument(
        "--layout",
        default="table",
        choices=(*catalogue_files.LAYOUTS, ZAPPOS),
        help="layout of the data (default: table)",
    )
    ranked.add_argument("--images", metavar="PATH", help="folder or zip file of the images (default: as in the layout)")
    ranked.add_argument("--attributes", metavar="A,B", help="attributes to evaluate (default: all)")
    ranked.add_argument(
        "--min-count", type=whole_number(0), default=0, help="minimum number of training items per value (default: 0)"
    )
    ranked.add_argument("--split", default="test", help="split: train, val or test (default: test)")
    add_old_spelling(ranked, "--part", "--split")
    ranked.add_argument(
        "--image-size",
        type=whole_number(1, LARGEST_SIDE),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the images (default: that of each model)",
    )
    ranked.add_argument("--matrix", type=Path, metavar="PNG", help="image of the entanglement matrix of one model")
    for protocol in (sr, pairs, ranked):
        protocol.add_argument("--output", type=Path, metavar="CSV", help="file for all rows")
        protocol.add_argument("--overwrite", action="store_true", help="replace existing outputs")
        protocol.add_argument("--device", default="auto", help="such as cpu or cuda:1 (default: a GPU if available)")
        protocol.add_argument("--dtype", default="float32", choices=DTYPES, help="precision (default: float32)")


def add_factor(parser: argparse.ArgumentParser) -> None:
    """Add `--factor`, whose value `factors` reads."""
    parser.add_argument(
        "--factor",
        type=_factor,
        action="append",
        metavar="F|SCENE=F",
        help="factor by which PNG values exceed disparities, for all scenes or per scene (default: assumed, see notes)",
    )


def _factor(text: str) -> tuple[str | None, float]:
    """`4` is for all scenes (None), `teddy=4` for one."""
    name, _, value = text.rpartition("=")
    return name or None, number(0, MOST_FACTOR, above=True)(value)


def factors(given: list[tuple[str | None, float]] | None) -> float | dict[str, float] | None:
    """Convert the values of `--factor` to the form that `visionattn.data.matching.stereo.find_scenes` takes.

    Raises:
        ConfigError: A factor for all scenes is combined with factors per scene, or a scene has two.
    """
    if not given:
        return None
    by_name = {name: value for name, value in given if name is not None}
    if not by_name:
        return given[-1][1]
    if len(by_name) < len(given):
        raise ConfigError("--factor must be either one number for all scenes, or SCENE=F once per scene.")
    return by_name


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0, or 1 if some images could not be measured; each is named on standard error.

    Raises:
        VisionAttnError: Nothing could be measured.
    """
    if args.output is not None:
        check_output(args.output, args.overwrite, (".csv",))
    # Names of files and scenes may look like markup.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    shown = console if sys.stdout.isatty() else None
    if args.protocol == "retrieval":
        return _retrieval(args, console)
    found: Measurements | StereoMeasurements
    if args.protocol == "sr":
        found = evaluate_sr(
            args.models,
            args.data,
            low_resolution=args.low_resolution,
            scale=args.scale,
            jpeg=args.jpeg,
            device=args.device,
            dtype=args.dtype,
            console=console,
            output=args.output,
        )
        if left_out := list_images(args.data).describe_left_out():
            print(f"visionattn: note: {shorten(args.data)}: left out {left_out}.", file=sys.stderr)
        title = f"PSNR / SSIM on Y, {found.folder}, scale {found.rows[0].scale}" if found.rows else ""
        title += f", JPEG of quality {args.jpeg}" if args.jpeg else ""
    else:
        found = evaluate_stereo(
            args.models,
            args.data,
            layout=args.layout,
            factor=factors(args.factor),
            baseline=args.baseline,
            enlarge=args.enlarge,
            fill=args.fill,
            device=args.device,
            dtype=args.dtype,
            console=shown,
        )
        title = "Disparity: EPE in pixels, others in percent"
    if found.rows:
        console.print(title, soft_wrap=True)
        console.print(found.table())
    if found.rows and args.output is not None:
        if not isinstance(found, Measurements):  # `evaluate_sr` has written its rows already
            found.write(args.output)
        console.print(f"The rows are in {args.output}.")
    for note in getattr(found, "notes", ()):
        console.print(f"note: {note}.", soft_wrap=True)
    for failure in found.failures:
        print(f"visionattn: {failure}", file=sys.stderr)
    return int(bool(found.failures))


def _retrieval(args: argparse.Namespace, console: Console) -> int:
    if args.matrix is not None:
        check_output(args.matrix, args.overwrite, SUFFIXES)
    common = {
        "images": args.images,
        "split": args.split,
        "image_size": args.image_size and tuple(args.image_size),
        "device": args.device,
        "dtype": args.dtype,
        "console": console,
    }
    if args.layout == ZAPPOS:
        if args.output or args.matrix:
            raise ConfigError("--output and --matrix are not available for triplets (--layout zappos): leave them out.")
        failures: list[str] = []
        found = retrieval.evaluate_triplets(args.models, args.data, **common, failures=failures)
        console.print(retrieval.triplet_table(found))
        return _name_failures(failures)
    measured = retrieval.evaluate_retrieval(
        args.models,
        args.data,
        layout=args.layout,
        attributes=args.attributes and [name.strip() for name in args.attributes.split(",")],
        min_count=args.min_count,
        **common,
    )
    matrices = {model: measured.matrix(model) for model in dict.fromkeys(row.model for row in measured.rows)}
    known = {model: matrix for model, matrix in matrices.items() if matrix is not None}
    if args.matrix is not None and len(known) != 1:
        raise ConfigError(f"--matrix requires exactly one model with conditions; got {len(known)}.")
    console.print(f"{shorten(measured.data)}, {measured.part}: percent of the queries", soft_wrap=True)
    console.print(measured.table())
    for model, matrix in known.items():
        console.print(measured.matrix_table(model))
        if args.matrix is not None:
            retrieval.draw_matrix(args.matrix, matrix, measured.attributes)
            console.print(f"The matrix is in {shorten(args.matrix)}.")
    if args.output is not None:
        measured.write(args.output)
        console.print(f"The rows are in {shorten(args.output)}.")
    return _name_failures(measured.failures)


def _name_failures(failures: list[str]) -> int:
    """Report images that were left out, and return the exit code."""
    for failure in failures:
        print(f"visionattn: {failure}", file=sys.stderr)
    if failures:
        print(f"visionattn: {len(failures)} images could not be read and are left out.", file=sys.stderr)
    return int(bool(failures))
