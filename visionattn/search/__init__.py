"""Image search and duplicate detection in an index of a folder; `visionattn.search` itself is callable.

index = visionattn.index("photos", "photos.index", "tf_efficientnet_lite0")  # a timm model name or a weight file
hits = visionattn.search(index, "query.jpg")  # attribute models also take an attribute: "colour"
print(visionattn.duplicates(index))
"""

from visionattn.lazy import lazily, make_callable

make_callable(__name__, "visionattn.search.api")

__all__ = ["Hit", "Hits", "ImageIndex", "build_index"]

_INDEX = "visionattn.search.image_index"
__getattr__ = lazily(
    __name__, {"Hit": _INDEX, "Hits": "visionattn.search.api", "ImageIndex": _INDEX, "build_index": _INDEX}
)
