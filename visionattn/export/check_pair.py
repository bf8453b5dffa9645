"""Compare the two files of an attribute-retrieval model with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from visionattn.errors import ExportError
from visionattn.export.budget import Budget
from visionattn.export.check import LEAST_SPREAD, frozen, outputs_of, random_images
from visionattn.export.rows import CheckRow
from visionattn.export.runtime import OnnxModel
from visionattn.export.schedule import Checked, Schedule
from visionattn.export.sizes import check_sizes

__all__ = ["check_pair"]

# Largest accepted absolute error of an embedding, whose length is 1.
TOLERANCE = 1e-4

BATCHES = (1, 3, 4)


def check_pair(model: Any, tower: OnnxModel, head: OnnxModel, budget: Budget) -> Checked:
    """Compare a pair in ONNX Runtime with the model in PyTorch, from random images to embeddings.

    Args:
        model: The model that was exported. It is not changed.
        tower: One file.
        head: The other.
        budget: The time limit.

    Returns:
        One row per size (those of the tower's check), batch size (three, or the fixed one twice) and number of
        attributes (1, 3 and all; repeated if there are fewer); all have passed.

    Raises:
        ExportError: Some rows fail; the message lists them. Or the time does not suffice for any size.
    """
    model, spec = frozen(model), tower.spec
    count = len(model.attributes)
    batches = BATCHES if spec.batch is None else (spec.batch,) * 2
    schedule = Schedule(check_sizes(spec), batches, budget)

    def compare(size: tuple[int, int]) -> list[CheckRow]:
        every, found, rows = [], [], []
        for number, batch in enumerate(batches):
            with schedule.comparing(size, number):
                (images,) = random_images(spec, batch, size, seed=number)
                every.append(outputs_of(model, [images])[0])  # (B, C, E)
                found.append(tower(images.numpy())[0])
        spread = (torch.cat(every) - every[0][:1]).abs().max().item()
        why = "" if spread >= LEAST_SPREAD else "the model's embeddings of two images are equal: load trained weights"
        for chosen in dict.fromkeys((1, 3, count)):
            ids = np.arange(count - chosen, count) % count
            for expected, tokens in zip(every, found):
                actual = head.compute({"tokens": tokens, "conditions": ids})[0]
                error = float(np.abs(actual - expected[:, torch.from_numpy(ids)].numpy()).max())
                name = f"embeddings, {chosen} of {count} attributes"
                rows.append(CheckRow(name, len(tokens), *size, (math.inf if why else error,), spread, TOLERANCE, why))
        return rows

    def judge(rows: list[CheckRow]) -> None:
        failed = [row for row in rows if not row.passed]
        if failed:
            raise ExportError(
                f"The outputs of tower and head differ from those of the model in {len(failed)} of {len(rows)} checks: "
                + "; ".join(map(str, failed))
                + "."
            )

    return schedule.run(spec.model, compare, judge)
