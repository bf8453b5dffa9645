"""The shipped MatchStereo network and OpenCV's semi-global matching on real pairs with truth.

python benchmarks/match_stereo_scenes.py FOLDER    # of Middlebury scenes

The network sees the views as they are, and in rows of their own enlarged twice (`--enlarge 2`).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from report import RESULTS, environment, write_rows
from visionattn.evaluate import stereo_matching

NETWORK = "va_match_stereo_nano"
ENLARGED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    measured = [(row, 1) for row in stereo_matching(NETWORK, folder, baseline="sgbm").rows]
    measured += [(row, ENLARGED) for row in stereo_matching(NETWORK, folder, enlarge=ENLARGED).rows]
    key = ("model", "enlarge", "scene", "region")
    rows = [
        {"model": row.model, "enlarge": enlarge, "scene": row.scene, "region": row.region}
        | {name: f"{value:.3f}" for name, value in asdict(row.errors).items()}
        | environment("cpu")
        for row, enlarge in measured
    ]
    write_rows(RESULTS / "match_stereo_scenes.csv", rows, key)


if __name__ == "__main__":
    main()
