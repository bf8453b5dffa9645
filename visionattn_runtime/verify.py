"""Verify a bundle of `visionattn export --bundle`: its files, their metadata, and their results on the sample."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from visionattn_runtime.errors import RunError, short
from visionattn_runtime.model import load

__all__ = ["CARD", "Row", "sample_error", "verify"]

CARD = "card.json"
FORMAT = 1
# Rounding changes some decisions of a matching network: this fraction of the values must be within the tolerance.
SHARE = 0.999
_BLOCK = 2**20


class Row(NamedTuple):
    """One check of a bundle.

    Attributes:
        file: Name of the checked file.
        passed: Whether it matches the card.
        finding: The result in words.
    """

    file: str
    passed: bool
    finding: str


def sample_error(found: np.ndarray, expected: np.ndarray) -> float:
    """99.9th percentile of the absolute differences; infinite if the shapes differ.

    NaN marks an unknown value; the difference is infinite where only one of the two is NaN.
    """
    if found.shape != expected.shape:
        return float("inf")
    both = np.isnan(found) & np.isnan(expected)
    difference = np.where(both, 0, np.abs(found.astype(np.float64) - expected))
    return float(np.quantile(np.nan_to_num(difference, nan=np.inf), SHARE, method="higher"))


def verify(folder: str | Path) -> list[Row]:
    """Verify a bundle without PyTorch.

    Args:
        folder: Folder of the bundle.

    Returns:
        One row per file for its hash, and for each variant one row for its metadata and one for its result on the
        sample.

    Raises:
        RunError: The folder is not a bundle, or its card cannot be read.
    """
    folder = Path(folder)
    card = _read_card(folder / CARD)
    rows = [_verify_file(folder, name, entry["sha256"]) for name, entry in card["files"].items()]
    extra = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx")} - set(card["files"]))
    rows += [Row(name, False, "is not in the card") for name in extra]
    for variant in card["variants"]:
        rows += _verify_variant(folder, card, variant)
    return rows


def _read_card(path: Path) -> Any:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{short(path.parent)} is not a bundle: it contains no {CARD}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"Cannot read {short(path)}: {short(error).rstrip('.')}.") from error
    try:
        if card["format"] != FORMAT:
            raise RunError(f"{short(path)} has format {short(card['format'], 20)}; this version reads {FORMAT}.")
        names = [*card["files"], *card["sample"]["images"], card["sample"]["expected"]]
        for entry in card["files"].values():
            str.lower(entry["sha256"])
        for variant in card["variants"]:
            names += [variant["file"]]
            if not 0 <= variant["allowed"] < float("inf") or not isinstance(variant["metadata"], dict):
                raise ValueError(variant["file"])
        outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{short(path)} is damaged: {type(error).__name__} {short(error, 60)}.") from error
    if outside:
        raise RunError(f"{short(path)} names a file outside of the bundle: {short(outside[0], 60)}.")
    return card


def _verify_file(folder: Path, name: str, sha256: str) -> Row:
    digest = hashlib.sha256()
    try:
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return Row(name, False, f"cannot be read: {error.strerror}")
    same = digest.hexdigest() == sha256
    return Row(name, same, "is unchanged" if same else "has changed: its SHA-256 is another")


def _verify_variant(folder: Path, card: Any, variant: Any) -> list[Row]:
    name = variant["file"]
    try:
        model = load(folder / name, threads=1)
    except RunError as error:
        return [Row(name, False, str(error))]
    texts, stated = model.texts, variant["metadata"]
    wrong = sorted(key for key in {**texts, **stated} if texts.get(key) != stated.get(key))
    finding = f"has other metadata than the card: {short(', '.join(wrong))}" if wrong else "carries the card's metadata"
    rows = [Row(name, not wrong, finding)]
    try:
        expected = np.load(folder / card["sample"]["expected"], allow_pickle=False)
        found = model.predict(*(folder / image for image in card["sample"]["images"]))
    # Reading damaged arrays can raise any exception.
    except Exception as error:
        return [*rows, Row(name, False, f"does not compute the sample: {short(error)}")]
    if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f":
        return [*rows, Row(name, False, "does not compute the sample: its expected result holds no floats")]
    distance, allowed = sample_error(found, expected), variant["allowed"]
    finding = f"computes the sample to {distance:.2g} of PyTorch's result; {allowed:.2g} is allowed"
    return [*rows, Row(name, distance <= allowed, finding)]
