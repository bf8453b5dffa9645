"""Run files of `visionattn export` without PyTorch: this package needs only numpy, pillow and onnxruntime.

    from visionattn_runtime import load

    model = load("model.onnx")
    model.classify("cat.jpg")               [[("cat", 0.98), ...]], the most probable first
    model.features("a.jpg", "b.jpg")        (2, D)
    model.upscale("small.png")              (r H, r W, C) of uint8, for images of any size, in tiles
    model.stereo("left.png", "right.png")   (H, W), disparity in pixels, NaN where it is unknown
    model.flow("first.png", "second.png")   (H, W, 2), in pixels
    load("F.onnx").embed("a.jpg")           (1, A, E), with the pair F.tower.onnx and F.head.onnx

An image is a path, a PIL image, or an array (H, W) or (H, W, C) of uint8, uint16 or floats in 0..1. As a command:

    python -m visionattn_runtime MODEL.onnx IMAGE... [--output F]
    python -m visionattn_runtime --verify FOLDER
"""

from visionattn_runtime.errors import RunError
from visionattn_runtime.model import Model, Pair, load
from visionattn_runtime.verify import Row, verify

__all__ = ["Model", "Pair", "Row", "RunError", "load", "verify"]
