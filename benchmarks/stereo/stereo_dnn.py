"""The small trained networks of NVIDIA's stereoDNN on real pairs with ground truth within their range.

    pip install tensorflow-cpu
    python -m benchmarks.stereo.stereo_dnn MODELS FOLDER    # stereoDNN/models of its repository; Middlebury scenes

The networks (arXiv 1803.09719, BSD-3) were trained on streets and take one size, to which views are brought by areas,
height and width by factors of their own. NVTiny compares 48 disparities; scenes with larger ones at its width are left
out for both. Writes results/stereo_dnn.csv.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import tensorflow.compat.v1 as tf

sys.modules["triton"] = None  # type: ignore[assignment]  # its LLVM and TensorFlow's do not live in one process
from benchmarks.report import RESULTS, environment, write_rows  # noqa: E402
from visionattn.data.matching.stereo import find_scenes  # noqa: E402
from visionattn.evaluate.cli import add_factor, factors  # noqa: E402
from visionattn.metrics.matching import disparity_errors  # noqa: E402

WIDTH, DISPARITIES = 513, 48
# The inputs and their height. Disparities come as shares of the width.
NETWORKS = {
    "NVTiny": (("Dataloader/ExpandDims:0", "Dataloader/ExpandDims_1:0"), 161),
    "ResNet-18_2D": (("IteratorGetNext:0", "IteratorGetNext:1"), 257),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("folder", type=Path)
    add_factor(parser)
    args = parser.parse_args()
    pairs = [(scene.name, scene.read()) for scene in find_scenes(args.folder, factor=factors(args.factor))]
    tf.disable_eager_execution()
    rows = []
    for name, (inputs, height) in NETWORKS.items():
        (graph,) = (args.models / name / "TensorFlow").glob("*.meta")
        with tf.Graph().as_default(), tf.Session() as session:
            tf.train.import_meta_graph(str(graph), clear_devices=True).restore(session, str(graph.with_suffix("")))
            for scene, pair in pairs:
                width = pair.truth.shape[1]
                if np.nanmax(pair.truth) / width > (DISPARITIES - 1) / WIDTH:
                    continue
                views = (cv2.resize(v, (WIDTH, height), interpolation=cv2.INTER_AREA) for v in (pair.left, pair.right))
                fed = {key: view[None].astype(np.float32) / 255 for key, view in zip(inputs, views)}
                found = session.run("disparities/ExpandDims:0", fed)[0, ..., 0] * width
                disparity = cv2.resize(found, pair.truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
                for region, mask in (("all", None), ("nonocc", pair.nonocc)):
                    if region == "all" or mask is not None:
                        errors = asdict(disparity_errors(disparity, pair.truth, mask))
                        rows.append(
                            {"model": name, "scene": scene, "region": region}
                            | {key: f"{value:.3f}" for key, value in errors.items()}
                            | {"tensorflow": tf.__version__}
                            | environment("cpu")
                        )
    write_rows(RESULTS / "stereo_dnn.csv", rows)


if __name__ == "__main__":
    main()
