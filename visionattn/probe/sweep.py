"""Train many probing heads in one pass over a frozen backbone's tokens, and select among them without the test images.

A share of the training images is held out to select the epoch of each head, and the head of each pooling and layer. The
test images are read after the training, and no selection depends on them.

The protocol is that of the paper: LARS with momentum 0.9 and trust 0.001, no trust ratio for biases, or AdamW; warm-up,
then cosine decay to 0 per step; batches of one size, with the incomplete last batch of an epoch dropped.

Sources: Efficient Probing, arXiv 2506.10178; MAE, arXiv 2111.06377; LARS, arXiv 1708.03888.

Deviations, and why. The authors select on the test images and report their best epoch. Here the last epoch and the one
selected on the held-out images are both reported. LARS is timm's, which divides by |g| + decay |w| as in its paper,
while the authors' code divides by |g + decay w|; without weight decay these are the same.
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
    """Split training images into those used for training and those held out for selection.

    The share applies to each class, rounded, with at least one image; no image of a class with one image is held out.

    Args:
        labels: Labels of all images, (n,).
        rows: Images to split, (m,).
        share: Share to hold out, from 0 to less than 1; 0: none.
        seed: Seed of the draw.

    Returns:
        Rows for training, and rows that are held out, both sorted.

    Raises:
        InputError: The share is out of range.
    """
    if not 0 <= share < 1:
        raise InputError(f"holdout must be from 0 to less than 1; got {share}.")
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
    """Train heads together, select, and test (see the module).

    Every batch is read once for all heads. Except for rounding, a head is the same as if it were trained alone. Heads
    compute in float32, or in float64 if the tokens are float64. Under torch.distributed all processes call this, each
    trains a share of the heads, and all return the whole result.

    Args:
        train: Training images.
        test: Test images.
        heads: Heads to train.
        epochs: Passes over the training images.
        batch_size: Images per step.
        warmup_epochs: Epochs in which the learning rate rises from 0.
        holdout: Share of the training images that is held out for selection; 0 if there is nothing to select.
        refit: Train the selected heads again, including the held-out images, for the same number of epochs, and test
            them after the last epoch.
        seed: Seed of the held-out images and of the order of images, which depends on it and on the epoch.
        device: Device on which heads are trained.
        state: File that is written after each epoch. A sweep that finds its own file resumes from it, with the same
            final result. The file of the refit is next to it; each of several processes has its own.
        rows: Training images to use, (m,); None: all.
        progress: Display of the progress bar.

    Raises:
        InputError: The images or settings are not supported; the message states why.
        UnknownNameError: A pooling does not exist.
        DataError: Tokens contain NaN or infinity, or the state file belongs to another sweep or is unreadable.
        StorageError: The state file could not be written.
    """
    heads = [_with_layer(spec, train) for spec in heads]
    rows = torch.arange(len(train)) if rows is None else rows
    notes = _check(train, test, heads, rows, epochs, warmup_epochs)
    fit_rows, held_rows = hold_out(train.labels, rows, holdout, seed)
    keys = [(spec.pooling, spec.layer) for spec in heads]
    if not len(held_rows) and len(set(keys)) < len(keys):
        raise InputError(
            "Selecting among several heads of one pooling and layer requires held-out training images: set holdout "
            "above 0, with at least two images of some class, or give one head of each."
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
            notes.append(f"All heads of {key[0]} at {train.layers[key[1]].name} diverged; none was selected.")
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
    """Train each process's share of the heads; return all heads, and the seconds of the slowest process."""
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
    """The same head, with its layer counted from 0."""
    count = len(features.layers)
    if not -count <= spec.layer < count:
        raise InputError(f"{spec} reads layer {spec.layer}, but the features have {count} layers.")
    return replace(spec, layer=spec.layer % count)


def _check(
    train: Features, test: Features, heads: list[HeadSpec], rows: torch.Tensor, epochs: int, warmup_epochs: float
) -> list[str]:
    """Check the inputs of a sweep, and return notes about them."""
    if not heads or epochs < 1 or not 0 <= warmup_epochs <= epochs:
        raise InputError(
            "A sweep requires at least one head, at least one epoch, and warmup_epochs from 0 to epochs; got "
            f"{len(heads)} heads, {epochs} epochs and {warmup_epochs} warm-up epochs."
        )
    if train.layers != test.layers or train.classes != test.classes:
        raise InputError("Training and test images must have the same layers and classes, in the same order.")
    if not len(test):
        raise InputError("There are no test images.")
    present, tested = (set(labels.tolist()) for labels in (train.labels[rows], test.labels))
    if len(present) < 2:
        raise InputError(f"The training images must have at least two classes; got {len(present)}.")
    if tested - present:
        names = ", ".join(train.classes[label] for label in sorted(tested - present))
        raise InputError(f"These classes have test images but no training images: {names}.")
    if present - tested:
        names = ", ".join(train.classes[label] for label in sorted(present - tested))
        return [f"These classes have no test images, so that they are not evaluated: {names}."]
    return []
