"""Frozen backbones: look inside their attention, and compute it in another way, without training."""

from visionattn.frozen.calls import Call, Reached, observing, replacing

__all__ = ["Call", "Reached", "observing", "replacing"]
