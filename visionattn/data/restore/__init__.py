"""Pairs of low- and high-resolution images for super-resolution."""

from visionattn.lazy import lazily

__all__ = ["RestoreData"]

__getattr__ = lazily(
    __name__,
    {
        "RestoreData": "visionattn.data.restore.datamodule",
    },
)
