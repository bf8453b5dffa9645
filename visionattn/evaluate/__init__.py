"""Evaluate models by the protocols of published benchmarks."""

from visionattn.evaluate.retrieval import evaluate_retrieval, evaluate_triplets
from visionattn.evaluate.sr import evaluate_sr
from visionattn.evaluate.stereo import disparity_errors, evaluate_stereo

__all__ = ["disparity_errors", "evaluate_retrieval", "evaluate_sr", "evaluate_stereo", "evaluate_triplets"]

# Former names of the functions.
attribute_retrieval, triplets = evaluate_retrieval, evaluate_triplets
stereo_matching, super_resolution = evaluate_stereo, evaluate_sr
