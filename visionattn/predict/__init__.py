"""Pictures in, pictures out: any size, alpha, 16 bit and grey, in tiles that fit the memory.

`visionattn.predict.upscale` takes what a program holds (array, PIL image, tensor); the command `visionattn upscale`
takes files, folders and videos.
"""

from visionattn.predict.restore import upscale

__all__ = ["upscale"]
