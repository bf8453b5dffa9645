"""Frozen backbones: what sparse attention costs them."""
