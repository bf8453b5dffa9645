"""Labelled images for classification."""

from visionattn.lazy import lazily

__all__ = ["ClassifyData"]

__getattr__ = lazily(
    __name__,
    {
        "ClassifyData": "visionattn.data.classify.datamodule",
    },
)
