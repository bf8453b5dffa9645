"""Degradations of low-resolution images: blur, noise, and JPEG with chroma subsampling.

    small = J_q,c(round(downscale(G_s * large) + n))

G_s is a Gaussian of standard deviation s, applied before downscaling; n is Gaussian noise; J is compression to JPEG and
decoding, of quality q and chroma subsampling c. All strengths are drawn from Python's and NumPy's global generators,
which a `SeededDataset` seeds by seed, epoch and index.
"""

from __future__ import annotations

import io
import math
import random

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

__all__ = ["SUBSAMPLINGS", "Degradation", "compress"]

SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
BEST_QUALITY = 95  # above it, JPEG files only become larger


def compress(image: np.ndarray, quality: int, subsampling: str = "4:2:0") -> np.ndarray:
    """An image as it looks after JPEG.

    Args:
        image: uint8 (H, W, 3).
        quality: As in libjpeg, 1 to 100.
        subsampling: One of `SUBSAMPLINGS`: chroma at full resolution, at half the width, or at half of both sides,
            which is what most cameras and programs write.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.array(Image.open(file))


class Degradation:
    """Blur before downscaling, then noise, then JPEG; the strength of each is drawn for every patch.

    Standard deviations are uniform from 0 (no change) to their maximum, JPEG qualities from the lowest to 95, and
    chroma subsampling is one of `SUBSAMPLINGS` with equal probability.

    Args:
        blur: Largest standard deviation of the blur, in pixels of the high-resolution image.
        noise: Largest standard deviation of the noise, in levels of 0..255.
        jpeg: Lowest JPEG quality, below 95; None for no JPEG.
    """

    def __init__(self, blur: float, noise: float, jpeg: int | None) -> None:
        self.blur = blur
        self.noise = noise
        self.jpeg = jpeg

    def __bool__(self) -> bool:
        return bool(self.blur or self.noise or self.jpeg)

    def before(self, large: np.ndarray) -> np.ndarray:
        """Blur."""
        sigma = random.uniform(0, self.blur)
        if sigma < 0.1:
            return large
        image = torch.from_numpy(large).permute(2, 0, 1)
        size = [min(2 * math.ceil(3 * sigma) + 1, (side - 1) // 2 * 2 + 1) for side in image.shape[:0:-1]]
        return gaussian_blur(image, size, [sigma, sigma]).permute(1, 2, 0).contiguous().numpy()

    def after(self, small: np.ndarray) -> np.ndarray:
        """Noise and JPEG."""
        if self.noise:
            noisy = small + np.random.normal(0, random.uniform(0, self.noise), small.shape)
            small = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        if self.jpeg is not None:
            small = compress(small, random.randint(self.jpeg, BEST_QUALITY), random.choice(SUBSAMPLINGS))
        return small
