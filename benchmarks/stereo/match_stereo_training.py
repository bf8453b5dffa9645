"""Learning curves of stereo training: the validation rows of runs of `visionattn fit`, into one CSV.

    python -m benchmarks.stereo.match_stereo_training "first stage"=RUN/version_0 "second stage"=RUN/version_1

A run is the folder that `visionattn fit` names at its end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from benchmarks.report import RESULTS, environment, read_rows, write_rows

MEASURES = ("epe", "nonocc_epe", "bad_1", "bad_2", "nonocc_bad_2", "d1")
SETTINGS = ("crop_size", "batch_size", "max_disparity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    rows = []
    for label, _, folder in (run.partition("=") for run in parser.parse_args().runs):
        data = yaml.safe_load((Path(folder) / "config.yaml").read_text())["data"]
        data = data.get("init_args", data)
        settings = {key: " x ".join(map(str, data[key])) if key == "crop_size" else data[key] for key in SETTINGS}
        for measured in read_rows(Path(folder) / "metrics.csv"):
            if measured["val/epe"]:
                values = {name: f"{float(measured[f'val/{name}']):.3f}" for name in MEASURES}
                rows.append({"run": label, "updates": int(measured["step"]) + 1, **settings, **values})
        if data.get("test") or not data.get("val"):  # else the best checkpoint is tested on the validation pairs
            rows.pop()  # its validation after training
    write_rows(RESULTS / "match_stereo_training.csv", [row | environment("cpu") for row in rows], ("run", "updates"))


if __name__ == "__main__":
    main()
