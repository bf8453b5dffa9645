"""Make the pictures of the README and of the documentation, docs/images/*.webp, mostly of the tour's outputs.

    visionattn quickstart TOUR
    python -m tools.front_pictures TOUR [upscale disparity attention search jpeg]

The tour's photographs are those that scikit-image installs and that may be passed on: the cat Chelsea and others (CC0),
and the Motorcycle pair of Middlebury.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data

import visionattn
from visionattn.data.matching.disparity import read_disparity
from visionattn.frozen import Call, observing
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.probe.report.maps import overlay

OUTPUT = Path(__file__).parents[1] / "docs" / "images"
LARGEST = 60_000  # bytes of a file
HEIGHT = 300
GAP = 6
EYES = (120, 60, 345, 210)  # of Chelsea: left, top, right, bottom
BACKBONE = "va_minimal_vit_micro_patch4_32"
SIDES = (112, 168)  # of the image whose attention is drawn: 28 x 42 patches


def enlarged(tour: Path) -> list[Image.Image]:
    """Chelsea's eyes at a quarter of the resolution, enlarged by interpolation and by the network."""
    return [Image.open(tour / "upscale" / f"{name}.png").crop(EYES) for name in ("bicubic", "network")]


def after_jpeg(_: Path) -> list[Image.Image]:
    """Chelsea's eyes at a quarter of the resolution and JPEG quality 50, enlarged by interpolation and two networks."""
    cat = Image.fromarray(data.chelsea()).crop((0, 0, 448, 300))
    file = BytesIO()
    cat.resize((cat.width // 4, cat.height // 4), Image.Resampling.BICUBIC).save(file, "JPEG", quality=50)
    small = Image.open(file)
    networks = [visionattn.upscale(small, name) for name in ("va_span_ch26_x4", "va_span_ch26_x4.real")]
    return [image.crop(EYES) for image in (small.resize(cat.size, Image.Resampling.BICUBIC), *networks)]


def disparity(tour: Path) -> list[Image.Image]:
    """Left view and disparity, near in red."""
    found, truth = (read_disparity(tour / "stereo" / f"{name}.pfm") for name in ("network", "truth"))
    colours = disparity_colours(found, usual_top(truth))
    return [Image.open(tour / "stereo" / "left.png"), Image.fromarray(colours)]


def looked_at() -> tuple[Image.Image, list[Call]]:
    """Chelsea, and the attention calls of a frozen transformer that sees the photograph, one per layer."""
    model = timm.create_model(BACKBONE, pretrained=True, img_size=SIDES).eval()
    photograph = Image.fromarray(data.chelsea()).crop((0, 0, 450, 300))
    small = photograph.resize(SIDES[::-1], Image.Resampling.BICUBIC)
    mean, std = (np.array(model.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = torch.from_numpy((np.asarray(small) / 255 - mean) / std).float().permute(2, 0, 1)[None]
    calls: list[Call] = []
    with observing(model, calls.append), torch.inference_mode():
        model(pixels)
    return photograph, calls


def attention(_: Path) -> list[Image.Image]:
    """Chelsea, and where the class token of the last layer looks, mean over heads."""
    photograph, calls = looked_at()
    last = calls[-1]
    weights = (last.q[0, :, :1] @ last.k[0].mT * last.scale).softmax(-1)[:, 0, last.prefix :].mean(0, keepdim=True)
    return [overlay(photograph, weights, last.grid)]


def nearest(tour: Path) -> list[Image.Image]:
    """A patch of the cat, and its two nearest images in an index of patches."""
    folder = tour / "search"
    hits = visionattn.search(folder / "photos.index", folder / "query.jpg", top=2, device="cpu")
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


PICTURES = {
    "upscale": enlarged,
    "disparity": disparity,
    "attention": attention,
    "search": nearest,
    "jpeg": after_jpeg,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tour", type=Path, help="folder of visionattn quickstart")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(PICTURES)}; default: all")
    args = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    for name in args.names or PICTURES:
        picture = side_by_side(PICTURES[name](args.tour), HEIGHT)
        path = OUTPUT / f"{name}.webp"
        for quality in (90, 80, 70, 60):
            picture.save(path, quality=quality, method=6)
            if path.stat().st_size <= LARGEST:
                break
        print(f"{path.name}: {picture.width} x {picture.height}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
