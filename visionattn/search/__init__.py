"""An index of a folder of images, for search and duplicates; the package is called as the function of its name.

index = visionattn.index("photos", "photos.index", "tf_efficientnet_lite0")  # any of timm's names, or a file
hits = visionattn.search(index, "query.jpg")  # by attributes, of a model that has them: "colour"
print(visionattn.duplicates(index))
"""

from visionattn.lazy import lazily, make_callable

make_callable(__name__, "visionattn.search.api")

__all__ = ["Hit", "Hits", "ImageIndex", "build_index"]

_INDEX = "visionattn.search.image_index"
__getattr__ = lazily(
    __name__, {"Hit": _INDEX, "Hits": "visionattn.search.api", "ImageIndex": _INDEX, "build_index": _INDEX}
)
