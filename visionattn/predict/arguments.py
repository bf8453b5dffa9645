"""Shared options of `visionattn upscale`, `visionattn stereo` and `visionattn flow`."""

from __future__ import annotations

import argparse

from visionattn.arguments import add_old_spelling, number, whole_number
from visionattn.models.enlarged import LARGEST
from visionattn.predict.network import DTYPES, PRECISIONS

__all__ = ["add_computing_arguments", "add_matching_arguments", "add_model_arguments", "add_output_arguments"]


def add_model_arguments(parser: argparse.ArgumentParser, kinds: str) -> None:
    """Add `--model` and `--checkpoint`; `kinds` is the help text of the former."""
    parser.add_argument("--model", metavar="NAME|FILE", help=kinds)
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weight file for --model NAME, if the file does not identify its model"
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about existing outputs."""
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--skip-existing", action="store_true", help="keep existing outputs: resumes a stopped run")


def add_computing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--dtype`."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda:1 (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: float16 on a GPU, otherwise that of the weights",
    )
    add_old_spelling(parser, "--precision", "--dtype", PRECISIONS)


def add_matching_arguments(
    parser: argparse.ArgumentParser, formats: tuple[str, ...], picture: str | None = None
) -> None:
    """Add the shared options of stereo and flow.

    Args:
        parser: The command's parser.
        formats: Suffixes; the first one is the default.
        picture: Name of an additional format, that of colour images.
    """
    names = [suffix[1:] for suffix in formats] + ([picture] if picture else [])
    looked_at = f"; {picture}: a colour image" if picture else ""
    add_model_arguments(parser, "name of the zoo, weight file or exported .onnx")
    parser.add_argument(
        "--format", choices=names, help=f"format of the files in a folder (default: {names[0]}{looked_at})"
    )
    parser.add_argument("--color", "--colour", action="store_true", help="also write NAME_color.png, a colour image")
    parser.add_argument("--nonocc", action="store_true", help="also write NAME_nonocc.png: white where not occluded")
    add_output_arguments(parser)
    add_computing_arguments(parser)
    parser.add_argument(
        "--max-pixels",
        type=whole_number(0),
        metavar="N",
        help="reduce larger images to N pixels (default: by the free memory)",
    )
    parser.add_argument(
        "--low-resolution-start",
        action="store_true",
        help="start from the result at half the size: for images of 2K and more",
    )
    parser.add_argument(
        "--enlarge",
        type=number(1, LARGEST),
        default=1.0,
        metavar="S",
        help="enlarge images by S before matching: finer, slower",
    )
