"""The shipped MatchStereo network and OpenCV's semi-global matching on real pairs with ground truth.

python -m benchmarks.stereo.match_stereo_scenes FOLDER --factor teddy=4 --factor tsukuba=16    # of Middlebury scenes

The network sees the views as they are, and in rows of their own enlarged twice, as they are and filled. Semi-global
matching stands as it is, and filled. Writes results/match_stereo_scenes.csv and the picture
docs/how-to/match_stereo_scenes.webp: of each scene filled semi-global matching and the enlarged and filled network,
disparities as colours and, in red, pixels with ground truth whose error exceeds 2.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

from benchmarks.report import RESULTS, environment, write_rows
from visionattn.data.matching.stereo import StereoPair, find_scenes
from visionattn.evaluate import evaluate_stereo
from visionattn.evaluate.cli import add_factor, factors
from visionattn.evaluate.sgbm import fill, sgbm
from visionattn.predict import estimate_disparity
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.predict.filling import fill_left

NETWORK = "va_match_stereo_nano"
ENLARGED = 2
USES: dict[str, dict[str, Any]] = {
    "": {},
    f"--enlarge {ENLARGED}": {"enlarge": ENLARGED},
    f"--enlarge {ENLARGED} --fill": {"enlarge": ENLARGED, "fill": True},
}
"""Options of the commands `stereo` and `evaluate stereo`, and the arguments for them."""
PICTURE = RESULTS.parent / "docs" / "how-to" / "match_stereo_scenes.webp"
WIDTH = 240  # of a scene in the figure


def panels(pair: StereoPair, disparities: list[np.ndarray]) -> np.ndarray:
    """Disparities (H, W) as colours, then what is wrong with each, side by side, (H', 4 WIDTH, 3) for two of them."""
    known, top = np.isfinite(pair.truth), usual_top(pair.truth)
    parts = [disparity_colours(disparity, top) for disparity in disparities]
    for disparity in disparities:
        wrong = known & ~(np.abs(disparity - pair.truth) <= 2)
        parts.append(np.where(wrong[..., None], (200, 30, 30), np.where(known[..., None], 230, 255)).astype(np.uint8))
    row = Image.fromarray(np.concatenate(parts, 1))
    return np.asarray(row.resize((len(parts) * WIDTH, round(WIDTH * pair.truth.shape[0] / pair.truth.shape[1]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    add_factor(parser)
    args = parser.parse_args()
    folder, factor = args.folder, factors(args.factor)
    measured = []
    for options, settings in USES.items():
        found = evaluate_stereo(NETWORK, folder, factor=factor, baseline=None if options else "sgbm", **settings)
        if found.failures:
            raise SystemExit("\n".join(found.failures))
        measured += [(row, options) for row in found.rows]
    key = ("model", "options", "scene", "region")
    rows = [
        {"model": row.model, "options": options, "scene": row.scene, "region": row.region}
        | {name: f"{value:.3f}" for name, value in asdict(row.errors).items()}
        | environment("cpu")
        for row, options in measured
    ]
    write_rows(RESULTS / "match_stereo_scenes.csv", rows, key)

    network, rendered = timm.create_model(NETWORK, pretrained=True).eval(), []
    for scene in find_scenes(folder, factor=factor):
        pair = scene.read()
        matched = fill(sgbm(pair.left, pair.right, float(np.nanmax(pair.truth))))
        learned = fill_left(estimate_disparity(pair.left, pair.right, network, enlarge=ENLARGED), pair.left)
        rendered.append(panels(pair, [matched, learned]))
    Image.fromarray(np.concatenate(rendered)).save(PICTURE, quality=80)


if __name__ == "__main__":
    main()
