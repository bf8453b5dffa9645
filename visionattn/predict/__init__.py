"""Apply models to images of any size, with alpha, 16 bits or grey, within the available memory.

`visionattn.upscale`, `stereo` and `flow` take one or two images: arrays, PIL images, tensors or paths. `upscale_files`,
`stereo_files` and `flow_files`, which the commands call, take files, folders and videos. `estimate_disparity` and
`estimate_flow` return a network's raw output. `build_index` and `ImageIndex`, the commands
`visionattn index` and `visionattn search`, find images by attributes.
"""

from visionattn.lazy import lazily
from visionattn.predict.consistency import seen_in_both
from visionattn.predict.flow import estimate_flow
from visionattn.predict.restore import upscale
from visionattn.predict.stereo import depth, estimate_disparity

__all__ = ["ImageIndex", "build_index", "depth", "estimate_disparity", "estimate_flow", "seen_in_both", "upscale"]

__getattr__ = lazily(__name__, {name: "visionattn.search.image_index" for name in ("ImageIndex", "build_index")})
