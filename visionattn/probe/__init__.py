"""Judging a frozen backbone: its tokens are pooled into one vector a picture, and a small head reads that."""

from visionattn.probe.poolings import POOLINGS, create_pooling

__all__ = ["POOLINGS", "create_pooling"]
