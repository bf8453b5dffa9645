"""Make a folder of training images for super-resolution from three packages of freely licensed images.

    apt-get download plasma-workspace-wallpapers mate-backgrounds tuxpaint-stamps-default
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    python -m tools.free_photographs unpacked FOLDER

Debian 12's plasma-workspace-wallpapers 4:5.27.5-2, mate-backgrounds 1.26.0-1 and tuxpaint-stamps-default 2022.06.04-1,
whose copyright files state GPL-2 or GPL-2+ for the images chosen here: photographs, and drawings with sharp edges.

Each wallpaper is reduced to widths of about 960, 640 and 480 pixels, which hides its compression artefacts, and divided
into tiles; the half with the most detail is kept, since flat areas such as skies add little. The stamps are mostly
animals, plants and objects cut out of photographs; those of at least 128 x 128 pixels are placed on grey.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

PLASMA = (
    "Altai Autumn BytheWater Canopee Cascade ColorfulCups Elarun EveningGlow FallenLeaf FlyingKonqui Grey "
    "IceCold Kite Kokkini OneStandsOut Patak Path SafeLanding Shell Volna"
)
MATE = (
    "abstract/Elephants_5640x3172 nature/Aqua nature/Blinds nature/Dune nature/FreshFlower nature/Garden "
    "nature/GreenMeadow nature/LadyBird nature/RainDrops nature/Storm nature/TwoWings nature/Wood "
    "nature/YellowFlower"
)
WIDTHS = (960, 640, 480)
TILE = 240
KEPT = 0.5
# Folders of stamps that are mostly letters, signs and drawings.
DRAWN = ("symbols", "clothes", "hobbies", "sports", "medical")
SMALLEST = 128


def wallpapers(share: Path) -> dict[str, Path]:
    """Map the name of each wallpaper to its largest file."""
    found = {}
    for name in PLASMA.split():
        files = (share / "wallpapers" / name / "contents" / "images").iterdir()
        found[name] = max(files, key=lambda file: Image.open(file).width)
    for name in MATE.split():
        found[Path(name).name] = share / "backgrounds" / "mate" / f"{name}.jpg"
    return found


def stamps(share: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and images of the stamps."""
    folder = share / "tuxpaint" / "stamps"
    for file in sorted(folder.rglob("*.png")):
        name = file.relative_to(folder)
        if name.parts[0] in DRAWN or "cartoon" in str(name) or "mirror" in str(name):
            continue
        image = Image.open(file)
        if image.mode not in ("RGB", "RGBA"):
            continue
        image = image.convert("RGBA")
        image = image.crop(image.getchannel("A").getbbox())
        if min(image.size) >= SMALLEST:
            grey = Image.new("RGBA", image.size, (127, 127, 127, 255))
            grey.alpha_composite(image)
            yield "_".join(name.with_suffix("").parts), grey.convert("RGB")


def tiles(name: str, image: Image.Image, width: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and tiles of an image that is reduced to about a width in pixels."""
    factor = max(1, round(image.width / width))
    image = image.resize((image.width // factor, image.height // factor), Image.Resampling.LANCZOS)
    for y, x in product(range(0, image.height - TILE + 1, TILE), range(0, image.width - TILE + 1, TILE)):
        yield f"{name}_{width}_{y}_{x}", image.crop((x, y, x + TILE, y + TILE))


def detail(tile: Image.Image) -> float:
    """Mean absolute difference of brightness between neighbouring pixels, in levels of 255."""
    grey = np.asarray(tile.convert("L"), dtype=float)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    share = args.unpacked / "usr" / "share"
    chosen = dict(stamps(share))
    print(f"{len(chosen)} stamps")
    for width in WIDTHS:
        cut = {}
        for name, file in wallpapers(share).items():
            cut |= tiles(name, Image.open(file).convert("RGB"), width)
        best = sorted(cut, key=lambda name: detail(cut[name]), reverse=True)[: round(KEPT * len(cut))]
        print(f"{len(best)} of {len(cut)} tiles of width {width}")
        chosen |= {name: cut[name] for name in best}
    for name, picture in chosen.items():
        picture.save(args.output / f"{name}.png")


if __name__ == "__main__":
    main()
