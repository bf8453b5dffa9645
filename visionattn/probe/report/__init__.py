"""The report of a probing run."""

from visionattn.probe.report.head_files import head_file, write_head
from visionattn.probe.report.report import (
    LayerNeighbours,
    PairedTest,
    Report,
    Skipped,
    load_head,
    percent,
)

__all__ = ["LayerNeighbours", "PairedTest", "Report", "Skipped", "head_file", "load_head", "percent", "write_head"]
