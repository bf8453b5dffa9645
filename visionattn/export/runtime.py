"""Running an exported file in ONNX Runtime, with plain words for an input that it does not accept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import InputError, require, shorten
from visionattn.export.spec import ExportSpec

__all__ = ["OnnxModel", "checked_path", "run"]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
SLACK = 8.0  # how far values may leave the range of images, in widths of that range
_REASON = 300  # characters of what ONNX Runtime says
_LARGEST = 2**31  # bytes of a protobuf message


class OnnxModel:
    """An exported file, loaded for the CPU.

    Args:
        path: A file that `visionattn export` wrote, converted to half precision by another tool or not.

    Attributes:
        spec: What the file says about itself.

    Raises:
        InputError: The file is not there, cannot be loaded, or was written by something else.
    """

    def __init__(self, path: str | Path) -> None:
        onnxruntime = require("onnxruntime", "export")
        self.path = checked_path(Path(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they are raised as well
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
                f"{shorten(path)} does not carry the metadata that `visionattn export` writes ({error}). "
                "Open a file from elsewhere with onnxruntime.InferenceSession."
            ) from error
        self._types = {value.name: value.type for value in self.session.get_inputs()}
        outputs = {value.name for value in self.session.get_outputs()}
        if set(self._types) != set(self.spec.input_names) or not outputs.issuperset(self.spec.output_names):
            names = shorten(", ".join([*self._types, *outputs]))
            raise InputError(f"{shorten(path)} has other inputs or outputs than its metadata says: {names}.")

    def __call__(self, *arrays: Any) -> list[np.ndarray]:
        """Compute the outputs, in the order of `spec.output_names`; those of half precision come as float32.

        Args:
            arrays: One array (B, C, H, W) of floats an input, in the order of `spec.input_names`; of a file that was
                exported with `preprocess`, (B, H, W, C) of uint8.

        Raises:
            InputError: Number, shape, type or values of the arrays are not what the file accepts: NaN, or images of
                0..255 that were not scaled.
        """
        spec = self.spec
        channels = spec.input_size[0]
        if len(arrays) != len(spec.input_names):
            raise InputError(f"This file has the inputs {', '.join(spec.input_names)}; {len(arrays)} were given.")
        feeds = {name: np.asarray(array) for name, array in zip(spec.input_names, arrays)}
        for name, array in feeds.items():
            if spec.input_type == "uint8":
                if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != channels:
                    raise InputError(
                        f"{name} is {array.shape} of {array.dtype}; this file takes pictures (batch, height, width, "
                        f"{channels}) of uint8, channels in {spec.input_order} order."
                    )
            elif array.dtype.kind != "f":
                raise InputError(
                    f"{name} has the type {array.dtype}; this file takes floats: the image in {spec.input_order} "
                    f"order, scaled to {spec.input_range}, minus mean {spec.mean}, divided by std {spec.std}."
                )
            elif array.ndim != 4 or array.shape[1] != channels:
                raise InputError(
                    f"{name} has the shape {array.shape}; this file takes (batch, {channels}, height, width), "
                    f"channels in {spec.input_order} order."
                )
            if array.shape != feeds[spec.input_names[0]].shape:
                raise InputError(f"The inputs differ in shape: {', '.join(str(a.shape) for a in feeds.values())}.")
            spec.check_size(*(array.shape[1:3] if spec.input_type == "uint8" else array.shape[2:]))
            spec.check_batch(array.shape[0])
            if spec.input_type != "uint8":
                self._check_values(name, array)
        return self.compute(feeds)

    def _check_values(self, name: str, array: np.ndarray) -> None:
        """Raise `InputError` for what no prepared image holds."""
        spec, (low, high) = self.spec, self.spec.input_range
        least, most = float(array.min(initial=np.inf)), float(array.max(initial=-np.inf))
        if not np.isfinite([least, most]).all() and array.size:
            raise InputError(f"{name} holds NaN or infinite values: replace them.")
        means, stds = spec.mean or [0.0], spec.std or [1.0]
        lowest = min((low - mean) / std for mean, std in zip(means, stds))
        highest = max((high - mean) / std for mean, std in zip(means, stds))
        # Interpolation leaves the range by a little, noise by more; images of 0..255 by far.
        room = SLACK * (highest - lowest)
        if least < lowest - room or most > highest + room:
            raise InputError(
                f"{name} holds values from {least:g} to {most:g}; prepared images of this file are in {lowest:.3g} to "
                f"{highest:.3g}: scale them to {low:g}..{high:g}, then subtract mean {spec.mean} and divide by std "
                f"{spec.std}."
            )

    def compute(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Compute the outputs from inputs by name; floats are given in the type that the file asks for.

        Raises:
            InputError: ONNX Runtime does not take them.
        """
        try:
            cast = {
                name: array.astype(_TYPES[self._types[name]], copy=False) if array.dtype.kind == "f" else array
                for name, array in feeds.items()
            }
            outputs = self.session.run(self.spec.output_names, cast)
        except KeyError as error:
            raise InputError(f"{shorten(self.path)} takes {error} instead of floats. Export it again.") from error
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            reason = shorten(error, _REASON).rstrip(".")
            raise InputError(f"ONNX Runtime cannot run the file of {self.spec.model}: {reason}.") from error
        return [array.astype(np.float32) if array.dtype == np.float16 else array for array in outputs]


def checked_path(path: Path) -> Path:
    """A path that may be opened: ONNX Runtime would wait for a pipe, or read a huge file whole."""
    try:
        if not path.is_file():
            raise InputError(f"There is no file {shorten(path)}.")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"Cannot open {shorten(path)}: {error.strerror}.") from error
    if size >= _LARGEST:
        raise InputError(f"{shorten(path)} has {size / 1e9:.1f} GB; an exported file has less than 2.1 GB.")
    return path


def run(path: str | Path, *arrays: Any) -> list[np.ndarray]:
    """Load an exported file and run it once (see `OnnxModel`, which is for running it again and again)."""
    return OnnxModel(path)(*arrays)
