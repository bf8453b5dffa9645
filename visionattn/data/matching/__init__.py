"""Pairs of views with ground truth for stereo matching and optical flow."""

from visionattn.lazy import lazily

__all__ = ["MatchData", "RandomWindows", "read_stereo"]

__getattr__ = lazily(
    __name__,
    {
        "MatchData": "visionattn.data.matching.datamodule",
        "RandomWindows": "visionattn.data.matching.datamodule",
        "read_stereo": "visionattn.data.matching.datamodule",
    },
)
