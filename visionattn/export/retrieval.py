"""Attribute retrieval as two files: a tower (image to tokens) and a head (tokens and attributes to embeddings).

Nearly all computation is in the tower: compute the tokens of an image once, then its embedding for any attribute, also
with a head that is trained later. `F.onnx` is the common name of the pair `F.tower.onnx` and `F.head.onnx`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import InputError, UnknownNameError
from visionattn.export.budget import TIME_LIMIT
from visionattn.export.pair import pair_paths, tower_and_head
from visionattn.export.part import Form
from visionattn.export.runtime import OnnxModel
from visionattn.export.write import OnnxFile, write_parts

__all__ = ["OnnxRetrieval", "export_retrieval", "pair_paths"]


class OnnxRetrieval:
    """An exported pair, loaded for the CPU.

    Args:
        path: The output of `visionattn export`: the pair's common name `F.onnx`.

    Attributes:
        attributes: Names of the attributes, in the order of their ids.
        tower: The file that computes tokens from images.
        head: The file that computes embeddings from tokens.

    Raises:
        InputError: A file does not exist or cannot be loaded, or the two do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        tower, head = pair_paths(path)
        self.tower, self.head = OnnxModel(tower), OnnxModel(head)
        if not self.tower.spec.pair or self.tower.spec.pair != self.head.spec.pair:
            raise InputError(f"{tower} and {head} belong to different models: export both again.")
        self.attributes = tuple(self.tower.spec.attributes or ())

    def tokens(self, images: Any) -> np.ndarray:
        """Images (B, C, H, W), preprocessed as stated in the tower's `spec`, -> tokens (B, N, D)."""
        return self.tower(images)[0]

    def embed(self, tokens: Any, conditions: Sequence[str | int] | None = None) -> np.ndarray:
        """Tokens (B, N, D) -> (B, C, E), of length 1.

        Args:
            tokens: Output of `tokens`.
            conditions: Names of attributes or their ids. Default: all.

        Raises:
            InputError: The batch size differs from the fixed one of the files.
            UnknownNameError: The files do not have an attribute.
        """
        every = range(len(self.attributes))
        tokens = np.asarray(tokens)
        self.head.spec.check_batch(len(tokens))
        ids = [self._place(condition) for condition in (every if conditions is None else conditions)]
        return self.head.compute({"tokens": tokens, "conditions": np.asarray(ids, np.int64)})[0]

    def __call__(self, images: Any, conditions: Sequence[str | int] | None = None) -> np.ndarray:
        """Images (B, C, H, W) -> (B, C, E) (see `tokens` and `embed`)."""
        return self.embed(self.tokens(images), conditions)

    def _place(self, condition: str | int) -> int:
        if condition in self.attributes:
            return self.attributes.index(condition)
        if isinstance(condition, str) or not 0 <= condition < len(self.attributes):
            raise UnknownNameError(
                f"The attribute must be one of {', '.join(map(repr, self.attributes))}; got {condition!r}."
            )
        return int(condition)


def export_retrieval(
    model: Any,
    path: str | Path,
    *,
    input_size: tuple[int, int] | None = None,
    dynamic_size: bool | None = None,
    batch: int | None = None,
    opset: int = 20,
    weights: str = "not stated",
    license: str | None = None,
    check: bool = True,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] | None = None,
) -> tuple[OnnxFile, OnnxFile]:
    """Write tower and head of an attribute-retrieval model, with dynamic batch and number of conditions; check both.

    Args:
        model: A model of `visionattn.models.cca`. Not changed.
        path: Common name `F.onnx` of the files (see `pair_paths`).
        input_size: See `export_onnx`, also for the following arguments.
        dynamic_size: Whether height and width are dynamic.
        batch: Fixed batch size; if the size is fixed too, the head has a fixed number of tokens. The number of
            conditions stays dynamic.
        opset: Version of the ONNX operator set.
        weights: Origin of the weights.
        license: Licence of the weights.
        check: Compare the tower's tokens, then the pair's embeddings, with the model's before the files are put in
            place.
        time_limit: See `export_onnx`.
        progress: See `export_onnx`.

    Returns:
        Tower and head; the head's rows are those of the pair.

    Raises:
        ExportError: The model cannot be exported in this form, or the files' outputs differ from it.
        InputError: The model does not accept the size, or the operator set does not exist.
        StorageError: A file could not be written.
    """
    parts = tower_and_head(model, path, Form(input_size, dynamic_size, opset, weights, license, batch))
    tower, head = write_parts(parts, check=check, time_limit=time_limit, progress=progress)
    return tower, head
