"""Tokens of a frozen backbone: computed, stored and loaded."""

from visionattn.probe.tokens.interface import Features, Layer, Tokens, dequantize

__all__ = ["Features", "Layer", "Tokens", "dequantize"]
