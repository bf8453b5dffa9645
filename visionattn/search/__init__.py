"""An index of a folder of images, searched by attributes; the package is called as the function of its name.

index = visionattn.index("photos", "photos.index", "best.ckpt")
hits = visionattn.search(index, "query.jpg", "colour")
"""

from visionattn.lazy import lazily, make_callable

make_callable(__name__, "visionattn.search.api")

__all__ = ["Hit", "Hits", "ImageIndex", "build_index"]

_INDEX = "visionattn.search.image_index"
__getattr__ = lazily(
    __name__, {"Hit": _INDEX, "Hits": "visionattn.search.api", "ImageIndex": _INDEX, "build_index": _INDEX}
)
