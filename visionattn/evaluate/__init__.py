"""Measuring models by the protocols that their benchmarks are compared by."""

from visionattn.evaluate.sr import super_resolution

__all__ = ["super_resolution"]
