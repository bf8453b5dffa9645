"""One attention mechanism a file: plain modules to copy into any network."""

from visionattn.blocks.efficient_probing import EfficientProbing
from visionattn.blocks.halo import HaloAttention
from visionattn.blocks.match import MatchAttention, MatchCrossAttention
from visionattn.blocks.match_decoder import ConvexUpsampling, ConvGLU, CorrelationStart, MatchLayer
from visionattn.blocks.minimal import MinimalAttention, MinimalBlock
from visionattn.blocks.span import SPAB, Conv3XC

__all__ = [
    "SPAB",
    "Conv3XC",
    "ConvGLU",
    "ConvexUpsampling",
    "CorrelationStart",
    "EfficientProbing",
    "HaloAttention",
    "MatchAttention",
    "MatchCrossAttention",
    "MatchLayer",
    "MinimalAttention",
    "MinimalBlock",
]
