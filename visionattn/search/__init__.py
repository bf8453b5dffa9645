"""An index of a folder of images, searched by attributes."""

from visionattn.lazy import lazily

__all__ = ["ImageIndex", "build_index"]

__getattr__ = lazily(__name__, {name: "visionattn.search.image_index" for name in __all__})
