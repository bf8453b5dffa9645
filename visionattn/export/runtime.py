"""Running an exported file in ONNX Runtime, with plain words for an input that it does not accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import InputError, require
from visionattn.export.spec import ExportSpec

__all__ = ["OnnxModel", "run"]


class OnnxModel:
    """An exported file, loaded for the CPU.

    Args:
        path: A file that `visionattn export` wrote.

    Attributes:
        spec: What the file says about itself.

    Raises:
        InputError: The file is not there, cannot be loaded, or was written by something else.
    """

    def __init__(self, path: str | Path) -> None:
        onnxruntime = require("onnxruntime", "export")
        if not Path(path).is_file():
            raise InputError(f"There is no file {path}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they are raised as well
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            raise InputError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}") from error
        try:
            self.spec = ExportSpec.from_metadata(self.session.get_modelmeta().custom_metadata_map)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{path} does not carry the metadata that `visionattn export` writes ({error}). "
                "Open a file from elsewhere with onnxruntime.InferenceSession."
            ) from error

    def __call__(self, *arrays: Any) -> list[np.ndarray]:
        """Compute the outputs, in the order of `spec.output_names`.

        Args:
            arrays: One array (B, C, H, W) of floats an input, in the order of `spec.input_names`.

        Raises:
            InputError: Number, shape or type of the arrays is not what the file accepts.
        """
        spec = self.spec
        channels = spec.input_size[0]
        if len(arrays) != len(spec.input_names):
            raise InputError(f"This file has the inputs {', '.join(spec.input_names)}; {len(arrays)} were given.")
        feeds = {name: np.asarray(array) for name, array in zip(spec.input_names, arrays)}
        for name, array in feeds.items():
            if array.dtype.kind != "f":
                raise InputError(
                    f"{name} has the type {array.dtype}; this file takes floats: the image in {spec.input_order} "
                    f"order, scaled to {spec.input_range}, minus mean {spec.mean}, divided by std {spec.std}."
                )
            if array.ndim != 4 or array.shape[1] != channels:
                raise InputError(
                    f"{name} has the shape {array.shape}; this file takes (batch, {channels}, height, width), "
                    f"channels in {spec.input_order} order."
                )
            if array.shape != feeds[spec.input_names[0]].shape:
                raise InputError(f"The inputs differ in shape: {', '.join(str(a.shape) for a in feeds.values())}.")
            spec.check_size(*array.shape[2:])
        return self.session.run(spec.output_names, {name: array.astype(np.float32) for name, array in feeds.items()})


def run(path: str | Path, *arrays: Any) -> list[np.ndarray]:
    """Load an exported file and run it once (see `OnnxModel`, which is for running it again and again)."""
    return OnnxModel(path)(*arrays)
