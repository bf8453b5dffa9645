"""Upscale a photograph four times: the shipped SPAN network compared with bicubic interpolation.

The photograph is scikit-image's cat Chelsea, first reduced by four, so that the ground truth is known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from visionattn.checkpoints import create_pretrained
from visionattn.errors import CheckpointError, require
from visionattn.predict import upscale
from visionattn.predict.compare import side_by_side
from visionattn.predict.engine import default_name
from visionattn.predict.images.picture import Picture, write
from visionattn.quickstart import TITLE

SCALE = 4

README = """
| file | what it is |
| --- | --- |
| `original.png` | scikit-image's photograph of the cat Chelsea |
| `small.png` | the same at a quarter of the height and width |
| `bicubic.png` | `small.png`, enlarged by bicubic interpolation: {bicubic:.2f} dB |
| `network.png` | `small.png`, enlarged by {name}: {network:.2f} dB |
| `compare.png` | both side by side |

dB: peak signal-to-noise ratio (PSNR) against `original.png` over all RGB values; higher is nearer.

## The same by command, in this folder

    visionattn upscale small.png large.png

## In Python

    import visionattn

    visionattn.upscale("small.png", "{name}").save("large.png")
"""


def _psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB."""
    error = np.square(image.astype(np.float64) - truth).mean()
    return float(10 * np.log10(255**2 / error))


def visit(folder: Path, console: Console) -> None:
    """Reduce, upscale with both methods and compare; write everything into `folder`."""
    data = require("skimage.data", "images")
    name = default_name(SCALE)
    try:
        model = create_pretrained(name)
    except CheckpointError as error:
        told = f"This station has nothing to show yet. {error}"
        console.print(told)
        (folder / "README.md").write_text(f"{TITLE}\n{told}\n")
        return
    photograph = data.chelsea()
    height, width = (side - side % SCALE for side in photograph.shape[:2])
    truth = photograph[:height, :width]
    image = Image.fromarray(truth)
    small = image.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC)
    bicubic = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    network = upscale(np.asarray(small), model)
    pictures = {"original": truth, "small": np.asarray(small), "bicubic": bicubic, "network": network}
    for label, pixels in pictures.items():
        write(folder / f"{label}.png", Picture(pixels))
    write(folder / "compare.png", side_by_side(pictures["small"], network))
    found = {label: _psnr(pictures[label], truth) for label in ("bicubic", "network")}
    for label, value in found.items():
        console.print(f"{label}: {value:.2f} dB PSNR against the original")
    console.print(f"Side by side: {folder / 'compare.png'}")
    (folder / "README.md").write_text(TITLE + README.format(name=name, **found))
