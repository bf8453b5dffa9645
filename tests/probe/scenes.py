"""Generated pictures of a disc and a square on a ground, with exact masks."""

import numpy as np
from PIL import Image

NAMES = ("ground", "disc", "square")


def scene(random, height, width):
    """An image and its mask: ground 0, disc 1, square 2."""
    picture = random.integers(0, 60, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    side = min(height, width) // 2
    for label, colour in ((1, (200, 60, 60)), (2, (60, 60, 200))):
        top, left = random.integers(0, height - side), random.integers(0, width - side)
        dy, dx = y - top - side / 2, x - left - side / 2
        inside = dy**2 + dx**2 < (side / 2) ** 2 if label == 1 else np.maximum(abs(dy), abs(dx)) < side / 2
        picture[inside] = np.array(colour) + random.integers(0, 55, (int(inside.sum()), 3))
        mask[inside] = label
    return picture, mask


def write_scenes(root, parts, low=48, high=80):
    """Folders PART/images and PART/masks of pictures of all sizes from `low` to `high`."""
    random = np.random.default_rng(0)
    for part, count in parts.items():
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for number in range(count):
            picture, mask = scene(random, *random.integers(low, high, 2))
            Image.fromarray(picture).save(root / part / "images" / f"{number:03d}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{number:03d}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
