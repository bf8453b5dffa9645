"""How fast generated pairs are drawn, on one core: results/stereo_scenes.csv.

    OMP_NUM_THREADS=1 python -m benchmarks.stereo.stereo_scenes [--photographs FOLDER] [--pairs 20]

Processor time is measured, not the clock: other processes do not change it. Textures are made before.
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.report import RESULTS, environment, write_rows
from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.data.matching.textures import POOL, procedural

CASES = ((192, 192, 64.0), (192, 384, 96.0), (320, 736, 192.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", help="a folder of photographs also used as textures")
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    for number in range(POOL):
        procedural(number)
    rows = []
    for flow in (False, True):
        for height, width, largest in CASES:
            folders = [args.photographs] if args.photographs else []
            pairs = GeneratedPairs(args.pairs, (height, width), largest, folders, flow, 0.0 if flow else 0.6)
            seconds = []
            for index in range(args.pairs):
                start = time.process_time()
                pairs[index]
                seconds.append(time.process_time() - start)
            low, median, high = statistics.quantiles(seconds, n=4)
            row = {
                "what": "flow" if flow else "stereo",
                "size": f"{height} x {width}",
                "textures": "procedural and photographs" if args.photographs else "procedural",
                "pairs_per_second": f"{1 / statistics.fmean(seconds):.1f}",
                "median_ms": f"{1e3 * median:.0f}",
                "iqr_ms": f"{1e3 * (high - low):.0f}",
                "seed": "0",
                **environment("cpu"),
            }
            print(row)
            rows.append(row)
    write_rows(RESULTS / "stereo_scenes.csv", rows, ("device", "what", "size", "textures"))


if __name__ == "__main__":
    main()
