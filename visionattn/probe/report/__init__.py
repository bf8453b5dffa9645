"""The report of a probing run."""

from visionattn.probe.report.report import (
    LayerNeighbours,
    PairedTest,
    Report,
    Skipped,
    head_file,
    load_head,
    percent,
    write_head,
)

__all__ = ["LayerNeighbours", "PairedTest", "Report", "Skipped", "head_file", "load_head", "percent", "write_head"]
