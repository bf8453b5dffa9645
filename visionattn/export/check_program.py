"""Compare a program of torch.export with its model."""

from __future__ import annotations

from torch import nn

from visionattn.errors import ExportError
from visionattn.export.budget import Budget
from visionattn.export.check import TOLERANCE, outputs_of, random_images
from visionattn.export.rows import CheckRow
from visionattn.export.schedule import Checked, Schedule
from visionattn.export.sizes import program_sizes
from visionattn.export.spec import ExportSpec

__all__ = ["check_program"]


def check_program(model: nn.Module, program: nn.Module, spec: ExportSpec, budget: Budget) -> Checked:
    """Compare a program of torch.export with the model, on random images from a fixed seed.

    Raises:
        ExportError: Some rows fail; the message lists them. Or the time does not suffice for any size.
        InputError: The model or the program fails at a size.
    """
    batch = spec.batch or 3
    schedule = Schedule(program_sizes(spec), [batch], budget)

    def compare(size: tuple[int, int]) -> list[CheckRow]:
        images, rows = random_images(spec, batch, size, seed=0), []
        with schedule.comparing(size, 0):
            pairs = zip(outputs_of(model, images), outputs_of(program, images))
        for name, (expected, output) in zip(spec.output_names, pairs):
            spread = (expected - expected[:1]).abs().max().item() if batch > 1 else expected.abs().max().item()
            errors = (output - expected).abs().flatten(1).amax(1).tolist()
            rows.append(CheckRow(name, batch, *size, tuple(errors), spread, TOLERANCE[0] + TOLERANCE[1] * spread))
        return rows

    def judge(rows: list[CheckRow]) -> None:
        failed = [str(row) for row in rows if not row.passed]
        if failed:
            raise ExportError(f"The outputs of the program differ from those of the model: {'; '.join(failed)}.")

    return schedule.run(spec.model, compare, judge)
