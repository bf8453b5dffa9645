"""One attention mechanism a file: plain modules to copy into any network."""

from visionattn.blocks.halo import HaloAttention
from visionattn.blocks.minimal import MinimalAttention, MinimalBlock

__all__ = ["HaloAttention", "MinimalAttention", "MinimalBlock"]
