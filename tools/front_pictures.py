"""Make the pictures of the README and of the documentation's front page: outputs of shipped models, docs/images/*.webp.

    python -m tools.front_pictures

The photographs are those that scikit-image installs and that may be passed on: Chelsea (CC0), the Motorcycle pair of
Middlebury (CC0), and those of `visionattn quickstart`, whose stations make the outputs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from skimage import data

import visionattn
from visionattn.data.matching.disparity import read_disparity
from visionattn.frozen import Call, observing
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.probe.report.maps import overlay
from visionattn.quickstart import search, stereo, upscale

OUTPUT = Path(__file__).parents[1] / "docs" / "images"
LARGEST = 60_000  # bytes of a file
HEIGHT = 300
GAP = 6
EYES = (150, 60, 350, 210)  # of Chelsea: left, top, right, bottom
BACKBONE = "va_minimal_vit_micro_patch4_32"
SIDE = 112  # of the image whose attention is drawn: 28 x 28 patches


def enlarged(folder: Path) -> list[Image.Image]:
    """Chelsea's eyes at a quarter of the resolution, enlarged by interpolation and by the network."""
    upscale.visit(folder, Console(quiet=True))
    return [Image.open(folder / f"{name}.png").crop(EYES) for name in ("bicubic", "network")]


def disparity(folder: Path) -> list[Image.Image]:
    """Left view and disparity, near in red."""
    stereo.visit(folder, Console(quiet=True))
    found = read_disparity(folder / "network.pfm")
    truth = read_disparity(folder / "truth.pfm")
    return [Image.open(folder / "left.png"), Image.fromarray(disparity_colours(found, usual_top(truth)))]


def attention(_: Path) -> list[Image.Image]:
    """Chelsea, and where the class token of the last layer looks, mean over heads."""
    model = timm.create_model(BACKBONE, pretrained=True, img_size=SIDE).eval()
    photograph = Image.fromarray(data.chelsea())
    square = photograph.crop((60, 0, 360, 300)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    config = model.pretrained_cfg
    pixels = torch.from_numpy(np.asarray(square)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    calls: list[Call] = []
    with observing(model, calls.append), torch.inference_mode():
        model((pixels - mean) / std)
    call = calls[-1]
    weights = (call.q[:, :, :1] @ call.k.mT * call.scale).softmax(-1)[0, :, 0, call.prefix :].mean(0, keepdim=True)
    panels = overlay(photograph.crop((60, 0, 360, 300)), weights, call.grid)
    return [panels]


def nearest(folder: Path) -> list[Image.Image]:
    """A patch of the cat, and its four nearest images in an index of patches."""
    search.visit(folder, Console(quiet=True))
    index = folder / "photos.index"
    hits = visionattn.search(index, folder / "query.jpg", top=4, images=folder / "photos", device="cpu")
    return [Image.open(path) for path in (folder / "query.jpg", *(folder / "photos" / hit.image for hit in hits))]


def side_by_side(images: list[Image.Image], height: int) -> Image.Image:
    """Images of one height in a row, on white."""
    scaled = [one.convert("RGB").resize((round(one.width * height / one.height), height), 3) for one in images]
    row = Image.new("RGB", (sum(one.width + GAP for one in scaled) - GAP, height), "white")
    x = 0
    for one in scaled:
        row.paste(one, (x, 0))
        x += one.width + GAP
    return row


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    for name, make, height in (
        ("upscale", enlarged, HEIGHT),
        ("disparity", disparity, HEIGHT),
        ("attention", attention, HEIGHT),
        ("search", nearest, 160),
    ):
        with tempfile.TemporaryDirectory() as folder:
            picture = side_by_side(make(Path(folder)), height)
        path = OUTPUT / f"{name}.webp"
        for quality in (90, 80, 70, 60):
            picture.save(path, quality=quality, method=6)
            if path.stat().st_size <= LARGEST:
                break
        print(f"{path.name}: {picture.width} x {picture.height}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
