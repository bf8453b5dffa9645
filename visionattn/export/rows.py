"""The rows of a check, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from visionattn.export.spec import size_text

__all__ = ["CheckRow", "print_rows"]


@dataclass(frozen=True)
class CheckRow:
    """One comparison. One that is impossible, or proves nothing, has an infinite error and a reason.

    `errors` has the largest error of each image; if the model makes decisions, without the fraction `OUTLIERS`.
    `spread` is the largest difference between the model's outputs for two images: how much an output depends on them.
    `rounding` is the error of PyTorch itself in float32, if it was computed.
    """

    output: str
    batch: int
    height: int
    width: int
    errors: tuple[float, ...]
    spread: float
    allowed: float
    reason: str = ""
    rounding: float = 0.0

    @property
    def error(self) -> float:
        """The largest error over all images, NaN if any is."""
        return float(np.max(self.errors))

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        found = self.reason or f"error {self.error:.2g}, allowed {self.allowed:.2g}"
        found += f", PyTorch's own in float32 {self.rounding:.2g}" if self.rounding else ""
        return f"{self.output} at {size_text(self.height, self.width)}, batch {self.batch}: {found}"


def print_rows(
    rows: Sequence[CheckRow], console: Console, unchecked: Sequence[str] = (), compared: str = "ONNX Runtime"
) -> None:
    """Print the rows of `check_onnx` as a table.

    Args:
        rows: The rows.
        console: Where to print.
        unchecked: Sizes that the check left out (see `visionattn.export.spec`).
        compared: What was compared with PyTorch.
    """
    one_size = len({(row.height, row.width) for row in rows}) == 1
    caption = "The file has one fixed size; no other size was checked." if one_size else None
    if unchecked:
        caption = f"Not checked: {', '.join(unchecked)}."
    table = Table(title=f"{compared} against PyTorch, random images", caption=caption)
    for header in ("output", "batch", "size", "error", "allowed", "spread", ""):
        table.add_column(header, justify="left" if header in ("output", "") else "right")
    for row in rows:
        table.add_row(
            row.output,
            str(row.batch),
            size_text(row.height, row.width),
            f"{row.error:.1e}",
            f"{row.allowed:.1e}",
            f"{row.spread:.3g}",
            "pass" if row.passed else "FAIL",
        )
    console.print(table)
