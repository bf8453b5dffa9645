"""State of a probing run besides its sweep, from which the same command resumes; checked when it is opened.

A damaged part is computed again, with a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from visionattn.errors import DataError, shorten
from visionattn.files import write_state
from visionattn.probe.few_shot import FewShotResult
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.heads.results import Score
from visionattn.probe.knn import Neighbours, NeighboursResult
from visionattn.probe.pixels import PixelBaseline, PixelHead
from visionattn.probe.processes import rank_and_size
from visionattn.probe.saved import read_state
from visionattn.probe.tokens.shards import read_checked_json, write_json

__all__ = ["RunState"]

T = TypeVar("T")


class RunState:
    """The folder of a run's state.

    Args:
        folder: The folder, named by a hash of what the numbers depend on.
        images: Number of test images.
        tell: Called with notes for the reader.

    Attributes:
        folder: The folder.
        seconds: Time of each part of the work, over all runs.
    """

    def __init__(self, folder: Path, images: int, tell: Callable[[str], Any]) -> None:
        self.folder, self.images, self.tell = folder, images, tell
        self.seconds = self._recall("seconds.json", _read_seconds) or {}

    def spend(self, what: str, seconds: float) -> None:
        """Add time spent on a part of the work."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds
        if rank_and_size()[0] == 0:
            write_json(self.folder / "seconds.json", self.seconds, indent=None)

    def neighbours(self, name: str) -> dict[tuple[Any, ...], NeighboursResult]:
        """Known results of k-NN, by the settings of the search."""
        return self._recall(name, lambda file: _read_neighbours(read_state(file), self.images)) or {}

    def keep_neighbours(self, name: str, known: dict[tuple[Any, ...], NeighboursResult]) -> None:
        """Store results of k-NN."""
        self._keep(name, {key: _pairs(result) for key, result in known.items()})

    def pixels(self, name: str) -> PixelBaseline | None:
        """Results of the pixel baseline; None if they are not known yet."""
        return self._recall(name, lambda file: _read_pixels(read_state(file), self.images))

    def keep_pixels(self, name: str, found: PixelBaseline) -> None:
        """Store the results of the pixel baseline."""
        linear = found.linear
        head = None if linear is None else {**vars(linear), "spec": asdict(linear.spec), "score": vars(linear.score)}
        pairs = {standardized: _pairs(result) for standardized, result in found.neighbours.items()}
        self._keep(name, {"neighbours": pairs, "linear": head})

    def few_shot(self, name: str) -> list[FewShotResult] | None:
        """Results of few-shot heads; None if they are not known yet."""
        return self._recall(name, lambda file: _read_few_shot(read_state(file)))

    def keep_few_shot(self, name: str, results: list[FewShotResult]) -> None:
        """Store results of few-shot heads."""
        self._keep(name, [asdict(result) for result in results])

    def _keep(self, name: str, content: Any) -> None:
        if rank_and_size()[0] == 0:
            write_state(self.folder / name, content)

    def _recall(self, name: str, read: Callable[[Path], T]) -> T | None:
        """Content of a file; None if it is missing or damaged."""
        file = self.folder / name
        if not file.exists():
            return None
        try:
            return read(file)
        except DataError as error:
            reason = str(error)
        except Exception as error:
            # A file of another program can have any content.
            reason = f"{shorten(file)} was not written by `visionattn probe`: {shorten(error)}."
        self.tell(f"{reason} It is computed again.")
        return None


def _read_seconds(file: Path) -> dict[str, float]:
    content = read_checked_json(file, {})
    if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in content.values()):
        raise DataError(f"{shorten(file)} is damaged: its times are not valid.")
    return content


def _pairs(result: NeighboursResult) -> list[dict[str, Any]]:
    return [{**vars(pair), "chosen": pair is result.chosen} for pair in result.pairs]


def _read_neighbours(content: dict[tuple[Any, ...], list[dict[str, Any]]], images: int) -> dict[Any, NeighboursResult]:
    known = {}
    for key, entries in content.items():
        chosen = [entry.pop("chosen") for entry in entries]
        pairs = [Neighbours(**entry) for entry in entries]
        for pair in pairs:
            _check_tensor(pair.predictions, torch.int64, images)
            _check_tensor(pair.confidences, torch.float64, images)
            _check_tensor(pair.correct, torch.bool, images)
            if not (isinstance(pair.k, int) and isinstance(pair.held_out_accuracy, float) and pair.temperature > 0):
                raise ValueError("its settings have another type")
        if [type(one) for one in chosen] != [bool] * len(pairs) or sum(chosen) != 1:
            raise ValueError("it does not state which pair was selected")
        known[key] = NeighboursResult(pairs, pairs[chosen.index(True)])
    return known


def _check_tensor(tensor: Tensor, dtype: torch.dtype, images: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (images,):
        raise ValueError(f"a tensor must be {dtype} ({images},); got {tensor.dtype} {tuple(tensor.shape)}")


def _read_pixels(content: dict[str, Any], images: int) -> PixelBaseline:
    neighbours, linear = _read_neighbours(content["neighbours"], images), content["linear"]
    if set(neighbours) not in (set(), {False, True}):
        raise ValueError("it lacks a k-NN")
    if linear is None:
        return PixelBaseline(neighbours, None)
    score = Score(**linear["score"])
    _check_tensor(score.predictions, torch.int64, images)
    _check_tensor(score.correct, torch.bool, images)
    _check_tensor(score.confidences, torch.float32, images)
    _check_tensor(score.nll, torch.float32, images)
    return PixelBaseline(neighbours, PixelHead(**{**linear, "spec": HeadSpec(**linear["spec"]), "score": score}))


def _read_few_shot(content: list[dict[str, Any]]) -> list[FewShotResult]:
    results = [FewShotResult(**entry) for entry in content]
    for result in results:
        named = isinstance(result.pooling, str) and isinstance(result.layer, str) and result.size > 0
        if not named or not result.accuracies or not all(0 <= value <= 1 for value in result.accuracies):
            raise ValueError("it has accuracies that are not between 0 and 1")
    return results
