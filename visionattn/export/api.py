"""`visionattn.export(MODEL, FILE)`: the function behind the command `visionattn export`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from visionattn.errors import InputError
from visionattn.export.budget import TIME_LIMIT
from visionattn.export.examples import load_data
from visionattn.export.formats import find_format
from visionattn.export.onnx import check_input_size, check_opset
from visionattn.export.pair import pair_paths, tower_and_head
from visionattn.export.part import Form, whole
from visionattn.export.untrained import draw_random_weights
from visionattn.export.variants import check_outputs, write_measured
from visionattn.export.write import OnnxFile, write_parts
from visionattn.files import check_output
from visionattn.opening import Opened, has_weights, is_file, open_model

__all__ = ["draw_random_weights", "export"]


def export(
    model: str | Path | nn.Module | Opened,
    output: str | Path,
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
    format: str | None = None,
    check: bool = True,
    random_weights: bool = False,
    time_limit: float = TIME_LIMIT,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[OnnxFile, ...]:
    """Export a model to ONNX and check the file against PyTorch; write variants and measure them on real data.

    A name without published weights is exported with random ones.

    Args:
        model: Name in timm's registry, weight file, folder or module (see `visionattn.opening.open_model`), or a head
            of `visionattn probe` with its backbone (see `visionattn.probe.head_network`).
        output: File to write. Its variants are named after it (see `visionattn.export.variants`).
        checkpoint: Weight file for a name.
        num_classes: Number of classes for a name. Default: the model's.
        image_size: Side, or height and width, of a file of fixed size, and the size around which it is checked.
            Default: the model's.
        static_size: Fix height and width in the file.
        batch: Fixed batch size. Default: dynamic.
        opset: Version of the ONNX operator set.
        int8: Also write `F.int8.onnx`. True calibrates on images from installed packages, a path on the images or
            stereo scenes in that folder.
        fp16: Also write `F.fp16.onnx`.
        preprocess: All files take uint8 images (B, H, W, C) and return images, probabilities or disparities.
        pad_channels: Pad the channels of convolutions to a multiple of 4: on CPUs, networks of other widths such as
            `va_span_ch26_x4` are faster, most in int8; in browsers they are slower.
        test_data: Folder of real data to measure variants on. Default: the calibration data.
        format: "onnx", "ort" (ONNX Runtime's format, for small builds) or "pt2" (a program of torch.export). Default:
            by the suffix of `output`.
        check: Compare the file with the model before it is put in place.
        random_weights: Use random weights (from a fixed seed) for a name, even if pretrained ones exist.
        time_limit: Maximum CPU time for tracing, translating and checking, in seconds. Sizes for which it does not
            suffice are not checked; the metadata list them as `unchecked`.
        overwrite: Replace an existing output.
        progress: Called with a line at the start of each step.

    Returns:
        The file with its variants, or the tower and the head of an attribute-retrieval model (see `export_retrieval`).

    Raises:
        ExportError: The model cannot be exported in this form or in this time, not a single size can be checked in it,
            or the file's outputs differ from it.
        InputError: The model does not accept the size, the operator set does not exist, or there are no channels to
            pad.
        DataError: There are too few calibration images, or no real data to measure on.
        StorageError: The output exists or could not be written.
        VisionAttnError: The model could not be opened, or random weights are requested for a model that has weights.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size:
        check_input_size(*size)
    check_opset(opset)
    kind = find_format(output, format)
    check_output(output, overwrite)
    varies = bool(int8 or fp16 or preprocess or kind == "ort")
    if varies:
        check_outputs(output, int8=int8, fp16=fp16, overwrite=overwrite)
    without = isinstance(model, str) and checkpoint is None and not is_file(model) and not has_weights(model)
    random = random_weights or without
    model_args: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    network, weights, licence = open_model(model, checkpoint, random, image_size=size, **model_args)
    if pad_channels and (getattr(network, "task", "") == "retrieve" or kind == "pt2"):
        raise InputError("--pad-channels (pad_channels=) applies to a model in one file that ends in .onnx or .ort.")
    if random:
        draw_random_weights(network, size)
    note = " (none are published for this name; give a weight file with --checkpoint (checkpoint=))" if without else ""
    if progress is not None:
        progress(f"Weights: {weights}{note}.")
    # A program of torch.export has no operator set of ONNX.
    form = Form(size, False if static_size else None, 20 if kind == "pt2" else opset, weights, licence, batch)
    is_pair = getattr(network, "task", "") == "retrieve" and kind == "onnx" and not varies
    if is_pair:
        for path in pair_paths(output):
            check_output(path, overwrite)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx" if varies else output
        parts = tower_and_head(network, output, form) if is_pair else (whole(network, target, form),)
        data = load_data(parts[0].spec, int8, test_data) if varies else None
        files = write_parts(parts, pad_channels=pad_channels, check=check, time_limit=time_limit, progress=progress)
        if data is None:
            return files
        file = files[0]
        variants = write_measured(
            file.path, file.spec, Path(output), data, fp16=fp16, preprocess=preprocess, progress=progress
        )
    first = variants[0]
    return (replace(file, path=first.path, spec=first.spec, bytes=first.bytes, variants=variants),)
