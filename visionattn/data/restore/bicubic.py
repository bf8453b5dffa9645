"""Bicubic resizing of 8-bit images by an integer factor, equal to MATLAB's `imresize(image, scale)`.

Super-resolution models are trained and evaluated on images downscaled by MATLAB; bicubic resizing of other libraries
differs visibly. For an output pixel i and a factor s (> 1 enlarges), along each axis,

    u = (i + 1/2) / s - 1/2                                position in the input
    w_j = k(m (u - j)) / sum_j k(m (u - j)),  m = min(s, 1)    when downscaling, the kernel is widened by 1/s
    k(x) = 3/2 |x|^3 - 5/2 |x|^2 + 1                       |x| <= 1        (Keys' kernel with a = -1/2)
         = -1/2 |x|^3 + 5/2 |x|^2 - 4 |x| + 2              1 < |x| <= 2

summed over all j, where the outermost pixel is replicated beyond the border. Rows are resized first, then columns, and
the values are rounded (half up) and clipped to 0..255 after each of the two. This equals the low-resolution images of
Set5 and Set14 used in the literature (SelfExSR, Huang et al., CVPR 2015) bit for bit; newer versions of MATLAB mirror
the border instead, which changes about three low-resolution pixels at each edge.

Kernel: R. Keys, Cubic convolution interpolation for digital image processing, IEEE TASSP 1981.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from visionattn.errors import InputError

__all__ = ["crop_to_multiple", "downscale", "upscale"]

BLOCK = 2**22  # values summed at a time


def downscale(image: np.ndarray, factor: int) -> np.ndarray:
    """Downscale an image.

    Args:
        image: uint8 (H, W) or (H, W, C), H and W multiples of `factor`.
        factor: Integer, at least 1.

    Returns:
        uint8 (H / factor, W / factor) or (H / factor, W / factor, C).

    Raises:
        InputError: The image is not 8-bit, or its size is not a multiple of `factor`.
    """
    _check(image, factor)
    if image.shape[0] % factor or image.shape[1] % factor:
        raise InputError(
            f"The height and width of an image must be multiples of {factor} to be downscaled by it; got "
            f"{image.shape[0]} x {image.shape[1]}. Use crop_to_multiple()."
        )
    return _resize(image, image.shape[0] // factor, image.shape[1] // factor)


def upscale(image: np.ndarray, factor: int) -> np.ndarray:
    """Upscale an image.

    Args:
        image: uint8 (H, W) or (H, W, C).
        factor: Integer, at least 1.

    Returns:
        uint8 (H * factor, W * factor) or (H * factor, W * factor, C).

    Raises:
        InputError: The image is not 8-bit.
    """
    _check(image, factor)
    return _resize(image, image.shape[0] * factor, image.shape[1] * factor)


def crop_to_multiple(image: np.ndarray, factor: int) -> np.ndarray:
    """Crop rows at the bottom and columns at the right until height and width are multiples of `factor`.

    Raises:
        InputError: The image is smaller than `factor`.
    """
    height, width = image.shape[0] // factor * factor, image.shape[1] // factor * factor
    if not height or not width:
        raise InputError(f"An image of {image.shape[0]} x {image.shape[1]} is too small for a factor of {factor}.")
    return image[:height, :width]


def _check(image: np.ndarray, factor: int) -> None:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        raise InputError(f"Bicubic resizing takes 8-bit images (H, W) or (H, W, C); got {image.dtype} {image.shape}.")
    if factor < 1:
        raise InputError(f"The factor must be at least 1; got {factor}.")


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = _weighted_sum(image.reshape(len(image), -1), height)  # (height, W * C)
    columns = np.ascontiguousarray(rows.reshape(height, image.shape[1], -1).swapaxes(0, 1))  # (W, height, C)
    result = _weighted_sum(columns.reshape(len(columns), -1), width)
    return np.ascontiguousarray(result.reshape(width, height, -1).swapaxes(0, 1)).reshape(
        height, width, *image.shape[2:]
    )


def _weighted_sum(lines: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis of uint8 (L, N) to (size, N)."""
    indices, weights = _contributions(len(lines), size)
    result = np.empty((size, lines.shape[1]), np.uint8)
    block = max(BLOCK // size, 1)
    # Float64 sums over a whole large image would take eight times its memory, more than once: it is summed in blocks.
    for start in range(0, lines.shape[1], block):
        columns = slice(start, start + block)
        total = np.zeros_like(result[:, columns], np.float64)
        for index, weight in zip(indices, weights):
            total += weight[:, None] * lines[index, columns]
        result[:, columns] = np.clip(np.floor(total + 0.5), 0, 255)
    return result


@lru_cache(maxsize=256)
def _contributions(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The input pixels of each output pixel: indices and weights, both (taps, new)."""
    scale = new / old
    shrink = min(scale, 1.0)
    centre = (np.arange(new) + 0.5) / scale - 0.5
    reach = 2 / shrink
    first = np.floor(centre - reach).astype(int) + 1
    taps = first + np.arange(int(np.ceil(2 * reach)))[:, None]
    weights = _kernel(shrink * (centre - taps))
    return np.clip(taps, 0, old - 1), weights / weights.sum(axis=0)


def _kernel(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
