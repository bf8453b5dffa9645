"""Attribute retrieval as two files: a tower (image to tokens) and a head (tokens and attributes to embeddings).

Nearly all computation is in the tower: compute the tokens of an image once, then its embedding for any attribute, also
with a head that is trained later. `F.onnx` is the common name of the pair `F.tower.onnx` and `F.head.onnx`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from visionattn.errors import ExportError, InputError, UnknownNameError
from visionattn.export.check import LEAST_SPREAD, CheckRow, check_sizes, frozen, outputs_of, random_images
from visionattn.export.onnx import OnnxFile, export_onnx, refusal, translate
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec
from visionattn.export.trace import TIME_LIMIT, trace
from visionattn.files import atomic_path

__all__ = ["OnnxRetrieval", "check_retrieval", "export_retrieval", "pair_paths"]

# Largest accepted absolute error of an embedding, whose length is 1.
TOLERANCE = 1e-4
BATCHES = (1, 3, 4)
AXES = ({0: "batch", 1: "tokens"}, {0: "conditions"})


def pair_paths(path: str | Path) -> tuple[Path, Path]:
    """The paths of tower and head for the common name `F.onnx`."""
    path = Path(path)
    return path.with_suffix(".tower.onnx"), path.with_suffix(".head.onnx")


class _Tower(nn.Module):
    """The part of a model that does not depend on the attribute, with the model's metadata about its input."""

    task = "retrieve"
    output_names = ("tokens",)
    num_classes = 0

    def __init__(self, model: Any, pair: str) -> None:
        super().__init__()
        self.model = model
        self.pair = pair
        for name in ("attributes", "pretrained_cfg", "_traits", "in_chans", "size_multiple", "size_minimum"):
            setattr(self, name, getattr(model, name))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.model.forward_tokens(images)


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
        time_limit: Maximum CPU time for tracing the tower, in seconds.
        progress: See `export_onnx`.

    Returns:
        Tower and head; the head's rows are those of the pair.

    Raises:
        ExportError: The model cannot be exported in this form, or the files' outputs differ from it.
        InputError: The model does not accept the size, or the operator set does not exist.
        StorageError: A file could not be written.
    """
    model = frozen(model)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    paths = pair_paths(path)
    with atomic_path(paths[0]) as first, atomic_path(paths[1]) as second:
        tower = export_onnx(
            _Tower(model, digest.hexdigest()[:16]),
            first,
            input_size=input_size,
            dynamic_size=dynamic_size,
            batch=batch,
            opset=opset,
            weights=weights,
            license=license,
            check=check,
            time_limit=time_limit,
            progress=progress,
        )
        start = time.perf_counter()
        axes = _open_axes(tower.spec)
        spec = replace(
            tower.spec,
            model=model.pretrained_cfg["architecture"],
            input_names=["tokens", "conditions"],
            output_names=["embeddings"],
            dynamic_axes=[name for names in axes for name in names.values()],
        )
        if progress:
            progress("Tracing, translating and checking the head.")
        traced = _trace_head(model, spec, axes)
        program = translate(traced, spec, axes)
        program.save(str(second), external_data=False)
        rows = check_retrieval(model, first, second) if check else []
        nodes, size = len(program.model.graph), second.stat().st_size
    head = OnnxFile(paths[1], spec, nodes, size, time.perf_counter() - start, rows)
    return replace(tower, path=paths[0]), head


def _open_axes(tower: ExportSpec) -> tuple[dict[int, str], dict[int, str]]:
    """The head's dynamic axes."""
    tokens, conditions = AXES
    if tower.batch is not None:
        tokens = {axis: name for axis, name in tokens.items() if name == "tokens" and tower.dynamic_size}
    return tokens, conditions


def _trace_head(model: Any, spec: ExportSpec, axes: Sequence[dict[int, str]]) -> torch.export.ExportedProgram:
    """Trace with more than one element on each dynamic axis, since 1 is a special case."""
    weight = next(model.parameters())
    count = 7
    if 1 not in axes[0]:
        image = torch.zeros(1, *spec.input_size, dtype=weight.dtype)
        count = model.forward_tokens(image).shape[1]
    tokens = torch.randn(spec.batch or 2, count, model.num_features, dtype=weight.dtype)
    dims = tuple(dict.fromkeys(names, Dim.DYNAMIC) for names in axes)
    try:
        return trace(model.head, (tokens, torch.zeros(3, dtype=torch.long)), dims)
    # The tracer raises whatever the traced code raises, and many exceptions of its own.
    except Exception as error:
        raise refusal("torch.export", spec, error) from error


def check_retrieval(model: Any, tower: str | Path, head: str | Path) -> list[CheckRow]:
    """Compare a pair in ONNX Runtime with the model in PyTorch, from random images to embeddings.

    Args:
        model: The model that was exported. It is not changed.
        tower: One file.
        head: The other.

    Returns:
        One row per size (those of the tower's check), batch size (three, or the fixed one twice) and number of
        attributes (1, 3 and all; repeated if there are fewer); all have passed.

    Raises:
        ExportError: Some rows fail; the message lists them.
    """
    model, first, second = frozen(model), OnnxModel(tower), OnnxModel(head)
    count, rows = len(model.attributes), []
    counts = BATCHES if first.spec.batch is None else (first.spec.batch,) * 2
    for size in check_sizes(first.spec):
        batches = [random_images(first.spec, batch, size, seed)[0] for seed, batch in enumerate(counts)]
        every = [outputs_of(model, [images])[0] for images in batches]  # (B, C, E) each
        found = [first(images.numpy())[0] for images in batches]
        spread = (torch.cat(every) - every[0][:1]).abs().max().item()
        why = "" if spread >= LEAST_SPREAD else "the model's embeddings of two images are equal: load trained weights"
        for number in dict.fromkeys((1, 3, count)):
            ids = np.arange(count - number, count) % count
            for expected, tokens in zip(every, found):
                actual = second.compute({"tokens": tokens, "conditions": ids})[0]
                error = float(np.abs(actual - expected[:, torch.from_numpy(ids)].numpy()).max())
                name = f"embeddings, {number} of {count} attributes"
                errors = (float("inf") if why else error,)
                rows.append(CheckRow(name, len(tokens), *size, errors, spread, TOLERANCE, why))
    failed = [row for row in rows if not row.passed]
    if failed:
        raise ExportError(
            f"The outputs of tower and head differ from those of the model in {len(failed)} of {len(rows)} checks: "
            + "; ".join(map(str, failed))
            + "."
        )
    return rows
