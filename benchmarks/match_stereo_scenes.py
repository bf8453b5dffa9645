"""The shipped MatchStereo network and OpenCV's semi-global matching on real pairs with truth.

python benchmarks/match_stereo_scenes.py FOLDER    # of Middlebury scenes
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from report import RESULTS, environment, write_rows
from visionattn.evaluate import stereo_matching


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    measured = stereo_matching("va_match_stereo_nano", parser.parse_args().folder, baseline="sgbm").rows
    key = ("model", "scene", "region")
    rows = [
        {name: getattr(row, name) for name in key}
        | {name: f"{value:.3f}" for name, value in asdict(row.errors).items()}
        | environment("cpu")
        for row in measured
    ]
    write_rows(RESULTS / "match_stereo_scenes.csv", rows, key)


if __name__ == "__main__":
    main()
