"""The command `python -m visionattn_runtime`, which is `run.py` in a bundle."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn_runtime.errors import RunError, short
from visionattn_runtime.model import Model, Pair, load
from visionattn_runtime.verify import verify

__all__ = ["main"]

DISPARITY_STEPS = 256  # per pixel, in a 16-bit PNG in KITTI's format; 0 is unknown
PRINTED = (".json", ".npy")  # for results that are also printed
SUFFIXES = {"restore": (".png", ".jpg", ".webp"), "stereo": (".npy", ".png"), "segment": (".png", ".npy")}


def main(argv: list[str] | None = None, folder: str = ".") -> int:
    """Run the command.

    Args:
        argv: Arguments of the command. Default: those of the process.
        folder: Bundle that `--verify` without a value refers to.

    Returns:
        0; 1 if a bundle does not match its card; 2 for an error, reported on one line.
    """
    parser = argparse.ArgumentParser(prog="visionattn_runtime", description="Run an exported file without PyTorch.")
    parser.add_argument("model", nargs="?", metavar="MODEL.onnx", help="file written by `visionattn export`")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="one image or more; left and right for stereo")
    parser.add_argument("--output", metavar="F", help="output file: .png, .npy or .json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes to print (default: 5)")
    parser.add_argument("--tile", type=int, default=256, metavar="N", help="side of a tile in pixels (default: 256)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads (default: ONNX Runtime's choice)")
    parser.add_argument("--verify", nargs="?", const=folder, metavar="FOLDER", help="verify a bundle and exit")
    args = parser.parse_args(argv)
    try:
        if args.verify is not None:
            return _verify(args.verify)
        if args.model is None:
            raise RunError("Give a model and an image, or --verify FOLDER. See --help.")
        _predict(args)
    except RunError as error:
        message = str(error)
    except MemoryError:
        message = "There is not enough memory for this."
    except OSError as error:
        message = f"{short(error.filename or args.output or args.model)}: {error.strerror or short(error)}."
    else:
        return 0
    print(f"visionattn_runtime: {message}", file=sys.stderr)
    return 2


def _verify(folder: str) -> int:
    rows = verify(folder)
    for row in rows:
        print(f"{'pass' if row.passed else 'FAIL'}  {row.file} {row.finding}")
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} checks passed.")
    return 1 if failed else 0


def _predict(args: argparse.Namespace) -> None:
    model = load(args.model, args.threads)
    output = _checked_output(args, model)
    if not args.images:
        raise RunError("No image was given.")
    if isinstance(model, Pair):
        _write(output, model.embed(*args.images))
    elif model.spec["task"] in ("restore", "segment"):
        if len(args.images) != 1:
            raise RunError(f"{short(args.model)} requires 1 image; got {len(args.images)}.")
        image = args.images[0]
        _write(output, model.segment(image) if model.spec["task"] == "segment" else model.upscale(image, args.tile))
    elif model.has_classes:
        if output is not None and output.suffix.lower() == ".npy":
            _write(output, model.probabilities(*args.images))
            return
        found = model.classify(*args.images, top=args.top)
        for image, classes in zip(args.images, found):
            print(f"{image}: {', '.join(f'{label} {probability:.1%}' for label, probability in classes)}")
        if output is not None:
            _write(output, dict(zip(args.images, found)))
    elif output is None or output.suffix.lower() == ".json":
        numbers = dict(zip(args.images, model.measure(*args.images)))
        for image, values in numbers.items():
            print(f"{image}: {', '.join(f'{name} {value:.5g}' for name, value in values.items())}")
        if output is not None:
            _write(output, numbers)
    else:
        _write(output, model.predict(*args.images))


def _checked_output(args: argparse.Namespace, model: Model | Pair) -> Path | None:
    """Return the output path; raise an error before any computation if it cannot be written."""
    prints = isinstance(model, Model) and (model.has_classes or model.spec["task"] == "regress")
    suffixes = PRINTED if prints else SUFFIXES.get(model.spec["task"], (".npy",))
    if args.output is None:
        if not prints:
            raise RunError(f"Give an output file: --output F{suffixes[0]}.")
        return None
    output = Path(args.output)
    if output.suffix.lower() not in suffixes:
        raise RunError(f"Cannot write {short(output)}: the file name must end in {' or '.join(suffixes)}.")
    if output.exists() and not output.is_file():
        raise RunError(f"Cannot write {short(output)}: it is not a regular file.")
    if output.exists() and not args.overwrite:
        raise RunError(f"{short(output)} exists. Give --overwrite to replace it, or name another output.")
    return output


def _write(output: Path | None, result: Any) -> None:
    """Write a result atomically."""
    assert output is not None
    temporary = output.with_name(f".{output.stem[:50]}.{os.getpid()}{output.suffix}")
    try:
        if isinstance(result, dict):
            temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        elif output.suffix.lower() == ".npy":
            np.save(temporary, result)
        elif result.dtype == np.uint8:
            Image.fromarray(result.squeeze(2) if result.shape[2:] == (1,) else result).save(temporary)
        else:
            steps = np.nan_to_num(np.rint(result * DISPARITY_STEPS)).clip(0, 65535).astype(np.uint16)
            Image.fromarray(steps).save(temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"Wrote {output}.")
