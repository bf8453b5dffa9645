"""Train many probing heads in one pass over a frozen backbone's tokens, and choose among them honestly.

A part of the training images is held out and chooses: the epoch of each head, and the head of each pooling and layer.
The test images are read when the training is over, and no choice depends on them.

The protocol is that of the paper: LARS with momentum 0.9 and trust 0.001, no trust ratio for biases, or AdamW; warm-up,
then half a cosine to 0, step by step; batches of one size, the rest of an epoch's images left out of that epoch.

Sources: Efficient Probing, arXiv 2506.10178; MAE, arXiv 2111.06377; LARS, arXiv 1708.03888.

Deviations, and why. The authors choose by the test images and report their best epoch. Here the last epoch and the one
that the held-out images chose are both reported. LARS is timm's, which divides by |g| + decay |w|, as its paper does,
where the authors' code divides by |g + decay w|; without weight decay these are the same.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from visionattn.errors import InputError
from visionattn.probe.heads.banks import HeadSpec
from visionattn.probe.heads.results import HeadResult, SweepResult
from visionattn.probe.heads.training import HeadTraining
from visionattn.probe.processes import rank_and_size, together
from visionattn.probe.tokens.interface import Features

__all__ = ["hold_out", "sweep"]


def hold_out(labels: torch.Tensor, rows: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide training images into those that train and those that choose.

    Each class gives its share, rounded, and at least one image; a class of one image gives none.

    Args:
        labels: Of all images, (n,).
        rows: Images to divide, (m,).
        share: To hold out, 0 to less than 1; none at 0.
        seed: Of the draw.

    Returns:
        Rows that train, and rows that are held out, both sorted.

    Raises:
        InputError: The share is out of range.
    """
    if not 0 <= share < 1:
        raise InputError(f"A share of the training images between 0 and 1 is held out, but got {share}.")
    random, kept, held = np.random.default_rng(seed), [], []
    for label in labels[rows].unique():
        members = random.permutation(rows[labels[rows] == label].numpy())
        count = min(len(members) - 1, max(1, math.floor(share * len(members) + 0.5))) if share else 0
        held.append(members[:count])
        kept.append(members[count:])
    return torch.from_numpy(np.sort(np.concatenate(kept))), torch.from_numpy(np.sort(np.concatenate(held)))


def sweep(
    train: Features,
    test: Features,
    heads: Sequence[HeadSpec],
    *,
    epochs: int = 90,
    batch_size: int = 4096,
    warmup_epochs: float = 10,
    holdout: float = 0.1,
    refit: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    state: Path | None = None,
    rows: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Train heads together, choose, and test (see the module).

    Every batch is read once for all heads. A head becomes what it becomes alone, but for rounding. Heads compute in
    float32, or in float64 where the tokens are float64. Under torch.distributed all processes call this, each trains a
    part of the heads, and all get the whole result.

    Args:
        train: Training images.
        test: Test images.
        heads: What to train.
        epochs: Passes over the training images.
        batch_size: Images a step.
        warmup_epochs: In which the learning rate rises from 0.
        holdout: Share of the training images that chooses; 0 where there is nothing to choose.
        refit: Train the chosen heads again, on the held-out images too, for the same number of epochs, and test them
            after the last.
        seed: Of the held-out part and of the order of images, which is a function of it and of the epoch.
        device: Where heads are trained.
        state: File that is written after each epoch. A sweep that finds its own file goes on from there, and ends with
            the same table. The refit's is next to it; of several processes each has its own.
        rows: Training images to use, (m,); all if None.
        progress: Where a bar appears while heads train.

    Raises:
        InputError: The images or settings do not allow the sweep; the message says why.
        UnknownNameError: There is no such pooling.
        DataError: Tokens are not finite, or the state file is another sweep's or unreadable.
        StorageError: The state file could not be written.
    """
    heads = [_with_layer(spec, train) for spec in heads]
    rows = torch.arange(len(train)) if rows is None else rows
    notes = _check(train, test, heads, rows, epochs, warmup_epochs)
    fit_rows, held_rows = hold_out(train.labels, rows, holdout, seed)
    keys = [(spec.pooling, spec.layer) for spec in heads]
    if not len(held_rows) and len(set(keys)) < len(keys):
        raise InputError(
            "No training image is held out, so that nothing can choose among several heads of one pooling and layer: "
            "hold out a share, with two images or more of a class, or give one head of each."
        )
    common: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "warmup_epochs": warmup_epochs, "seed": seed, "progress": progress
    }  # fmt: skip
    results, seconds = _divide(train, test, heads, fit_rows, held_rows, torch.device(device), state, common)
    chosen = []
    for key in dict.fromkeys(keys):
        able = [result for result, other in zip(results, keys, strict=True) if other == key and not result.diverged]
        if able:
            chosen.append(max(able, key=lambda result: result.held_out_accuracy if result.held_out else 0.0))
        else:
            notes.append(f"All heads of {key[0]} at {train.layers[key[1]].name} diverged; none was chosen.")
    if refit and chosen:
        state = None if state is None else state.with_name(f"{state.stem}-refit{state.suffix}")
        specs, none = [result.spec for result in chosen], torch.empty(0, dtype=torch.int64)
        again, more = _divide(train, test, specs, rows.sort().values, none, torch.device(device), state, common)
        chosen = [replace(result, refit=True) for result in again]
        seconds += more
    return SweepResult(results, chosen, epochs, seconds, notes)


def _divide(
    train: Features,
    test: Features,
    heads: list[HeadSpec],
    fit_rows: torch.Tensor,
    held_rows: torch.Tensor,
    device: torch.device,
    state: Path | None,
    common: dict[str, Any],
) -> tuple[list[HeadResult], float]:
    """Train each process's share of the heads; give all of them, and the seconds of the slowest process."""
    process, processes = rank_and_size()
    if processes > 1 and state is not None:
        state = state.with_name(f"{state.stem}-{process + 1}-of-{processes}{state.suffix}")
    mine = range(process, len(heads), processes)

    def work() -> tuple[list[HeadResult], float]:
        if not mine:
            return [], 0.0
        run = HeadTraining(
            train, test, [heads[n] for n in mine], fit_rows, held_rows, device=device, state=state, **common
        )
        return run.results(), run.seconds

    shares = together(work)
    results = [shares[number % processes][0][number // processes] for number in range(len(heads))]
    return results, max(seconds for _, seconds in shares)


def _with_layer(spec: HeadSpec, features: Features) -> HeadSpec:
    """The same head with its layer counted from 0."""
    count = len(features.layers)
    if not -count <= spec.layer < count:
        raise InputError(f"{spec} reads layer {spec.layer}, but the features have {count} layers.")
    return replace(spec, layer=spec.layer % count)


def _check(
    train: Features, test: Features, heads: list[HeadSpec], rows: torch.Tensor, epochs: int, warmup_epochs: float
) -> list[str]:
    """Refuse what cannot be swept over; give notes about what can."""
    if not heads or epochs < 1 or not 0 <= warmup_epochs <= epochs:
        raise InputError(
            "A sweep has a head or more, an epoch or more, and no more epochs to warm up, but got "
            f"{len(heads)} heads, {epochs} epochs and {warmup_epochs} to warm up."
        )
    if train.layers != test.layers or train.classes != test.classes:
        raise InputError("Training and test images must have the same layers and classes, in the same order.")
    if not len(test):
        raise InputError("There are no test images.")
    present, tested = (set(labels.tolist()) for labels in (train.labels[rows], test.labels))
    if len(present) < 2:
        raise InputError(f"Probing tells classes apart, but the training images have {len(present)} class(es).")
    if tested - present:
        names = ", ".join(train.classes[label] for label in sorted(tested - present))
        raise InputError(f"These classes have test images and no training images: {names}.")
    if present - tested:
        names = ", ".join(train.classes[label] for label in sorted(present - tested))
        return [f"These classes have no test images, so that the test says nothing about them: {names}."]
    return []
