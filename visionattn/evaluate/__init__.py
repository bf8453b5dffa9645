"""Measuring models by the protocols that their benchmarks are compared by."""

from visionattn.evaluate.retrieval import attribute_retrieval, triplets
from visionattn.evaluate.sr import super_resolution
from visionattn.evaluate.stereo import disparity_errors, stereo_matching

__all__ = ["attribute_retrieval", "disparity_errors", "stereo_matching", "super_resolution", "triplets"]
