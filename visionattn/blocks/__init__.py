"""One attention mechanism per file: plain modules to copy into any network."""

from visionattn.blocks.condition_heads import AttributeSpecificAttention, ConditionalSimilarityMask, ConditionLinear
from visionattn.blocks.conditional import ConditionalCrossAttention
from visionattn.blocks.dual_cross import DualCrossAttention, DualCrossBlock, GlobalLocalCrossAttention
from visionattn.blocks.efficient_probing import EfficientProbing
from visionattn.blocks.halo import HaloAttention
from visionattn.blocks.match import MatchAttention, MatchCrossAttention
from visionattn.blocks.match_decoder import ConvexUpsampling, ConvGLU, CorrelationStart, MatchLayer
from visionattn.blocks.match_encoder import MatchEncoder, MatchFusion
from visionattn.blocks.minimal import MinimalAttention, MinimalBlock
from visionattn.blocks.span import SPAB, Conv3XC
from visionattn.blocks.subspace import SubspaceAttention

__all__ = [
    "SPAB",
    "AttributeSpecificAttention",
    "ConditionLinear",
    "ConditionalCrossAttention",
    "ConditionalSimilarityMask",
    "Conv3XC",
    "ConvGLU",
    "ConvexUpsampling",
    "CorrelationStart",
    "DualCrossAttention",
    "DualCrossBlock",
    "EfficientProbing",
    "GlobalLocalCrossAttention",
    "HaloAttention",
    "MatchAttention",
    "MatchCrossAttention",
    "MatchEncoder",
    "MatchFusion",
    "MatchLayer",
    "MinimalAttention",
    "MinimalBlock",
    "SubspaceAttention",
]
