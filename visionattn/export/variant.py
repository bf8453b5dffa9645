"""One variant of an exported file: finished, compared with the float32 file by its task's metric, and written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visionattn.errors import shorten
from visionattn.export.formats import write_model
from visionattn.export.preprocess import with_preprocessing
from visionattn.export.quality import Quality, Reference
from visionattn.export.spec import ExportSpec
from visionattn.files import atomic_path

__all__ = ["Variant", "write_variant"]

GAIN = 1.05  # smallest speed-up at which a variant is recommended
SMALLER = 0.75  # relative size below which a float16 variant is recommended


@dataclass(frozen=True)
class Variant:
    """A variant of an exported file, compared with the float32 file.

    Attributes:
        path: The file.
        spec: Its metadata.
        bytes: Its size; 0 if it was refused.
        quality: The metric of the float32 file and of this one; None if nothing was measured.
        speed: Speed-up over the float32 file with one thread on this processor: median of paired runs.
        spread: Half the interquartile range of `speed`.
        kept: Nodes left in float, since their quantisation loses too much.
        recommended: Whether it is faster or, for float16, smaller.
        refused: Why it was not written; empty if it was.
    """

    path: Path
    spec: ExportSpec
    bytes: int
    quality: Quality | None = None
    speed: float = 1.0
    spread: float = 0.0
    kept: tuple[str, ...] = ()
    recommended: bool = True
    refused: str = ""

    def describe(self) -> str:
        """One sentence: why it was refused, or its size and speed."""
        if self.refused:
            return f"{self.path.name} was not written: {self.refused}."
        text = f"{self.path.name}: {self.bytes / 1e6:.2f} MB, {self.speed:.2f} times the speed of float32 here"
        if self.kept:
            text += f", {len(self.kept)} layers in float ({shorten(', '.join(self.kept))})"
        return text + ("." if self.recommended else ": no gain on this processor, not recommended.")


def write_variant(
    model: Any,
    spec: ExportSpec,
    precision: str,
    path: Path,
    reference: Reference,
    preprocess: bool = False,
    kept: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Variant:
    """Write a graph if it loses no more than the metric of its task allows.

    Args:
        model: The graph, an `onnx.ModelProto`; changed.
        spec: Metadata of the float32 file.
        precision: "fp32", "fp16" or "int8".
        path: File to write, ending in .onnx or .ort.
        reference: The float32 file.
        preprocess: Take uint8 images and return images, probabilities or disparities.
        kept: Nodes left in float.
        progress: Called with a line before the measurement.

    Raises:
        ExportError: ONNX Runtime cannot convert, load or run it.
        StorageError: The file could not be written.
    """
    if preprocess:
        model, spec = with_preprocessing(model, spec)
    spec = replace(spec, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"finished{path.suffix}"
        write_model(model, spec, file)
        quality, speed, spread = reference.quality, 1.0, 0.0
        if precision != "fp32" or preprocess or path.suffix.lower() == ".ort":  # otherwise it is the float32 file
            progress(f"Measuring {path.name} on {len(reference.examples)} examples.")
            quality, speed, spread = reference.compare(file, spec)
            if not quality.passed:
                return Variant(path, spec, 0, quality, kept=kept, recommended=False, refused=str(quality))
        size = file.stat().st_size
        with atomic_path(path) as temporary:
            temporary.write_bytes(file.read_bytes())
    gains = precision == "fp32" or speed >= GAIN or (precision == "fp16" and size < SMALLER * reference.bytes)
    return Variant(path, spec, size, quality, speed, spread, kept, gains)
