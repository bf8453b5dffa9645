"""Run an exported file in ONNX Runtime, with clear messages for inputs that it does not accept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import ExportError, InputError, require, shorten
from visionattn.export.spec import ExportSpec

__all__ = ["OnnxModel", "checked_path", "open_exported", "run"]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
SLACK = 8.0  # how far values may be outside of the range of images, in widths of that range
_REASON = 300  # maximum characters of ONNX Runtime's error message
_LARGEST = 2**31  # bytes of a protobuf message


class OnnxModel:
    """An exported file, loaded for the CPU.

    Args:
        path: A file written by `visionattn export`, possibly converted to half precision by another tool.

    Attributes:
        spec: The file's metadata.

    Raises:
        InputError: The file does not exist, cannot be loaded, or was not written by this package.
    """

    def __init__(self, path: str | Path) -> None:
        onnxruntime = require("onnxruntime", "export")
        self.path = checked_path(Path(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # only errors, which are raised as well
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            reason = shorten(error, _REASON).rstrip(".")
            raise InputError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {shorten(path)}: {reason}."
            ) from error
        try:
            self.spec = ExportSpec.from_metadata(metadata)
        except InputError as error:
            raise InputError(
                f"{shorten(path)} does not have the metadata that `visionattn export` writes ({error}). "
                "Open files of other tools with onnxruntime.InferenceSession."
            ) from error
        self._types = {value.name: value.type for value in self.session.get_inputs()}
        outputs = {value.name for value in self.session.get_outputs()}
        if set(self._types) != set(self.spec.input_names) or not outputs.issuperset(self.spec.output_names):
            names = shorten(", ".join([*self._types, *outputs]))
            raise InputError(f"The inputs or outputs of {shorten(path)} differ from its metadata: {names}.")

    def __call__(self, *arrays: Any) -> list[np.ndarray]:
        """Compute the outputs, in the order of `spec.output_names`; half-precision outputs are returned as float32.

        Args:
            arrays: One float array (B, C, H, W) per input, in the order of `spec.input_names`; for a file exported with
                `preprocess`, uint8 (B, H, W, C).

        Raises:
            InputError: The file does not accept the number, shape, type or values of the arrays, such as NaN, or images
                in 0..255 that were not scaled.
        """
        spec = self.spec
        channels = spec.input_size[0]
        if len(arrays) != len(spec.input_names):
            raise InputError(f"This file takes the inputs {', '.join(spec.input_names)}; got {len(arrays)} arrays.")
        feeds = {name: np.asarray(array) for name, array in zip(spec.input_names, arrays)}
        for name, array in feeds.items():
            if spec.input_type == "uint8":
                if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != channels:
                    raise InputError(
                        f"{name} must be uint8 images (batch, height, width, {channels}), channels in "
                        f"{spec.input_order} order; got {array.dtype} {array.shape}."
                    )
            elif array.dtype.kind != "f":
                raise InputError(
                    f"{name} must be floats: the image in {spec.input_order} order, scaled to {spec.input_range}, "
                    f"minus mean {spec.mean}, divided by std {spec.std}; got {array.dtype}."
                )
            elif array.ndim != 4 or array.shape[1] != channels:
                raise InputError(
                    f"{name} must have the shape (batch, {channels}, height, width), channels in {spec.input_order} "
                    f"order; got {array.shape}."
                )
            if array.shape != feeds[spec.input_names[0]].shape:
                raise InputError(
                    f"All inputs must have the same shape; got {', '.join(str(a.shape) for a in feeds.values())}."
                )
            spec.check_size(*(array.shape[1:3] if spec.input_type == "uint8" else array.shape[2:]))
            spec.check_batch(array.shape[0])
            if spec.input_type != "uint8":
                self._check_values(name, array)
        return self.compute(feeds)

    def _check_values(self, name: str, array: np.ndarray) -> None:
        """Raise `InputError` for values that a preprocessed image cannot have."""
        spec, (low, high) = self.spec, self.spec.input_range
        least, most = float(array.min(initial=np.inf)), float(array.max(initial=-np.inf))
        if not np.isfinite([least, most]).all() and array.size:
            raise InputError(f"{name} contains NaN or infinite values: replace them.")
        means, stds = spec.mean or [0.0], spec.std or [1.0]
        lowest = min((low - mean) / std for mean, std in zip(means, stds))
        highest = max((high - mean) / std for mean, std in zip(means, stds))
        # Interpolation exceeds the range slightly, noise more; images in 0..255 by far.
        room = SLACK * (highest - lowest)
        if least < lowest - room or most > highest + room:
            raise InputError(
                f"{name} has values from {least:g} to {most:g}; preprocessed images of this file are in {lowest:.3g} "
                f"to {highest:.3g}: scale them to {low:g}..{high:g}, then subtract mean {spec.mean} and divide by std "
                f"{spec.std}."
            )

    def compute(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Compute the outputs from inputs by name; floats are cast to the type of the file's inputs.

        Raises:
            InputError: ONNX Runtime cannot run the file on them.
        """
        try:
            cast = {
                name: array.astype(_TYPES[self._types[name]], copy=False) if array.dtype.kind == "f" else array
                for name, array in feeds.items()
            }
            outputs = self.session.run(self.spec.output_names, cast)
        except KeyError as error:
            raise InputError(
                f"The inputs of {shorten(self.path)} must be floats, but are {error}: export it again."
            ) from error
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            reason = shorten(error, _REASON).rstrip(".")
            raise InputError(f"ONNX Runtime cannot run the file of {self.spec.model}: {reason}.") from error
        return [array.astype(np.float32) if array.dtype == np.float16 else array for array in outputs]


def open_exported(path: str | Path) -> OnnxModel:
    """Open a file that was just exported.

    Raises:
        ExportError: It is malformed.
        InputError: It cannot be loaded.
    """
    onnx = require("onnx", "export")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exported file is not valid ONNX: {error}") from error
    return OnnxModel(path)


def checked_path(path: Path) -> Path:
    """A path that is safe to open: ONNX Runtime would block on a pipe, or read a huge file completely."""
    try:
        if not path.is_file():
            raise InputError(f"There is no file {shorten(path)}.")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"Cannot open {shorten(path)}: {error.strerror}.") from error
    if size >= _LARGEST:
        raise InputError(f"{shorten(path)} has {size / 1e9:.1f} GB; an exported file must be smaller than 2.1 GB.")
    return path


def run(path: str | Path, *arrays: Any) -> list[np.ndarray]:
    """Load an exported file and run it once (use `OnnxModel` to run it repeatedly)."""
    return OnnxModel(path)(*arrays)
