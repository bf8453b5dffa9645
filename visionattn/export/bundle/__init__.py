"""A self-contained folder to run a model without PyTorch: `visionattn export NAME --bundle FOLDER`.

    model.onnx, model.int8.onnx, model.fp16.onnx     the file and its variants
    model.tower.onnx, model.head.onnx                instead, for attribute retrieval
    card.json, README.md                             description, quality loss and cost
    LICENSE, labels.txt, weights.md                  if applicable
    sample/                                          an image and PyTorch's result for it
    run.py, visionattn_runtime/                      the runner: needs numpy, pillow and onnxruntime
    run.mjs, run.cpp                                 shorter examples for browsers and Node, and for C++

`python run.py --verify` verifies it without PyTorch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import visionattn_runtime
from visionattn.errors import ExportError
from visionattn.export.api import export
from visionattn.export.budget import TIME_LIMIT
from visionattn.export.bundle import card as cards
from visionattn.export.bundle.sample import check_sample, compute_expected, draw_result, sample_images, write_images
from visionattn.export.onnx import OnnxFile
from visionattn.export.spec import ExportSpec
from visionattn.files import atomic_folder
from visionattn.opening import Opened, open_model
from visionattn_runtime import Row, load, verify
from visionattn_runtime.verify import CARD

__all__ = ["Bundle", "export_bundle"]

MODEL = "model.onnx"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        folder: The bundle.
        files: The exported files in it.
        card: The content of `card.json`.
        rows: The rows of its verification.
    """

    folder: Path
    files: tuple[OnnxFile, ...]
    card: dict[str, Any]
    rows: list[Row]


def export_bundle(
    model: str | Path | nn.Module | Opened,
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    static_size: bool = False,
    batch: int | None = None,
    opset: int = 20,
    int8: bool | str | Path = False,
    fp16: bool = False,
    preprocess: bool = False,
    pad_channels: bool = False,
    test_data: str | Path | None = None,
    time_limit: float = TIME_LIMIT,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Bundle:
    """Export a model to a folder that needs neither PyTorch nor this package; it is written completely or not at all.

    Args:
        model: A model with weights, as in `visionattn.export`.
        folder: A new or empty folder or, with `overwrite`, another bundle.
        checkpoint: See `visionattn.export`, also for the following arguments.
        num_classes: Number of classes for a name. Default: the model's.
        image_size: Side, or height and width, of a file of fixed size, and the size around which it is checked.
        static_size: Fix height and width in the files.
        batch: Fixed batch size.
        opset: Version of the ONNX operator set.
        int8: Add int8: True, or a folder of calibration data.
        fp16: Add float16.
        preprocess: All files take uint8 images and return images, probabilities or disparities.
        pad_channels: Pad the channels of convolutions to a multiple of 4, for CPUs (see `visionattn.export`).
        test_data: Folder of real data to measure variants on.
        time_limit: Maximum CPU time for tracing, translating and checking, in seconds. A bundle whose check does not
            end within it is not written.
        overwrite: Replace an existing bundle.
        progress: Called with a line at the start of each step.

    Raises:
        ExportError: The model cannot be exported or checked in this time, or the verification of the bundle fails.
        InputError: The folder contains something else, the model does not accept an argument, or there is no sample
            image for its task.
        VisionAttnError: The model could not be opened, or has no weights.
    """
    tell = progress or (lambda line: None)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    with atomic_folder(folder, overwrite, CARD) as room:
        model_args: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        network = open_model(model, checkpoint, image_size=size, **model_args).model
        check_sample(ExportSpec.of(network, size, False if static_size else None, opset, "", None, batch))
        files = export(
            model,
            room / MODEL,
            checkpoint=checkpoint,
            num_classes=num_classes,
            image_size=image_size,
            static_size=static_size,
            batch=batch,
            opset=opset,
            int8=int8,
            fp16=fp16,
            preprocess=preprocess,
            pad_channels=pad_channels,
            test_data=test_data,
            time_limit=time_limit,
            progress=progress,
        )
        unchecked = dict.fromkeys(size for file in files for size in file.spec.unchecked or ())
        if unchecked:
            raise ExportError(
                f"A bundle contains checked files only, and the check at {', '.join(unchecked)} does not end within "
                f"{time_limit:,.10g} s of CPU time: raise the limit with --time-limit (time_limit=)."
            )
        tell("Measuring the files and writing their card.")
        card = _fill(room, network, files, str(test_data or (int8 if isinstance(int8, (str, Path)) else "")))
        tell("Verifying the bundle.")
        rows = verify(room)
        failed = [f"{row.file} {row.finding}" for row in rows if not row.passed]
        if failed:
            raise ExportError(f"The verification of the bundle failed: {'; '.join(failed)}.")
    return Bundle(Path(folder), tuple(_moved(file, Path(folder)) for file in files), card, rows)


def _moved(file: OnnxFile, folder: Path) -> OnnxFile:
    """The file with its paths in the final folder."""
    variants = tuple(replace(variant, path=folder / variant.path.name) for variant in file.variants)
    return replace(file, path=folder / file.path.name, variants=variants)


def _fill(folder: Path, network: nn.Module, files: tuple[OnnxFile, ...], data: str) -> dict[str, Any]:
    """Write everything except the models, and return the card."""
    file, spec = files[0], files[0].spec
    sample = folder / "sample"
    sample.mkdir()
    images, source = sample_images(spec)
    names = write_images(images, spec, sample)
    paths = [sample / name for name in names]
    expected = compute_expected(network.eval(), load(folder / MODEL, threads=1), paths)
    np.save(sample / "expected.npy", expected)
    if (picture := draw_result(expected, spec)) is not None:
        picture.save(sample / "expected.png")
    standing = [variant for variant in file.variants if not variant.refused]
    entries = [(variant, folder / variant.path.name) for variant in standing] or [(None, folder / MODEL)]
    described = [cards.describe_file(file, variant, path, folder, expected, paths) for variant, path in entries]
    card = cards.make_card(
        spec,
        described,
        {"images": [f"sample/{name}" for name in names], "expected": "sample/expected.npy", "source": source},
        Path(data).name or "images from installed packages",
    )
    texts = {
        "README.md": cards.write_readme(card, spec),
        "LICENSE": cards.license_text(spec),
        "labels.txt": "".join(f"{label}\n" for label in spec.labels or []),
        "weights.md": cards.weights_card(spec),
    }
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text, encoding="utf-8")
    _copy_code(folder)
    card["files"] = cards.list_files(folder)
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def _copy_code(folder: Path) -> None:
    package = Path(visionattn_runtime.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(package / "__main__.py", folder / "run.py")
    for sample in ("run.mjs", "run.cpp"):
        shutil.copyfile(Path(__file__).with_name(sample), folder / sample)
