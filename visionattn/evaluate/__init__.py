"""Measuring models by the protocols that their benchmarks are compared by."""

from visionattn.evaluate.retrieval import evaluate_retrieval, evaluate_triplets
from visionattn.evaluate.sr import evaluate_sr
from visionattn.evaluate.stereo import disparity_errors, evaluate_stereo

__all__ = ["disparity_errors", "evaluate_retrieval", "evaluate_sr", "evaluate_stereo", "evaluate_triplets"]

# The names before the functions were called as their commands.
attribute_retrieval, triplets = evaluate_retrieval, evaluate_triplets
stereo_matching, super_resolution = evaluate_stereo, evaluate_sr
