"""Make a folder of training pictures for super-resolution from two packages of freely licensed wallpapers.

    apt-get download plasma-workspace-wallpapers mate-backgrounds
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    python benchmarks/free_photographs.py unpacked FOLDER

Debian 12's plasma-workspace-wallpapers 4:5.27.5-2 and mate-backgrounds 1.26.0-1, whose copyright files state GPL-2+ for
the pictures chosen here: photographs, and drawings with sharp edges. Each is shrunk to a width of about 960 pixels,
which hides the traces of its own compression, and cut into tiles, of which the 2 in 5 with the most detail are kept:
skies teach nothing.
"""

from __future__ import annotations

import argparse
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
WIDTH = 960
TILE = 240
KEPT = 0.4


def sources(unpacked: Path) -> dict[str, Path]:
    """Name of each picture and its largest file."""
    share = unpacked / "usr" / "share"
    found = {}
    for name in PLASMA.split():
        files = (share / "wallpapers" / name / "contents" / "images").iterdir()
        found[name] = max(files, key=lambda file: Image.open(file).width)
    for name in MATE.split():
        found[Path(name).name] = share / "backgrounds" / "mate" / f"{name}.jpg"
    return found


def detail(tile: Image.Image) -> float:
    """How much the brightness of a picture differs between neighbours, in levels of 255."""
    grey = np.asarray(tile.convert("L"), dtype=float)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tiles = {}
    for name, file in sources(args.unpacked).items():
        image = Image.open(file).convert("RGB")
        factor = max(1, round(image.width / WIDTH))
        image = image.resize((image.width // factor, image.height // factor), Image.Resampling.LANCZOS)
        for y, x in product(range(0, image.height - TILE + 1, TILE), range(0, image.width - TILE + 1, TILE)):
            tiles[f"{name}_{y}_{x}"] = image.crop((x, y, x + TILE, y + TILE))
    chosen = sorted(tiles, key=lambda name: detail(tiles[name]), reverse=True)[: round(KEPT * len(tiles))]
    for name in chosen:
        tiles[name].save(args.output / f"{name}.png")
    print(f"{len(chosen)} of {len(tiles)} tiles")


if __name__ == "__main__":
    main()
