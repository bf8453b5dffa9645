"""Optical flow of networks next to OpenCV's DIS and Farneback, on pairs with exact ground truth.

    python -m benchmarks.stereo.flow_pairs va_match_flow_nano before=old.ckpt [--pairs 32] [--photographs FOLDER]

Three kinds of pairs: generated ones of seed 2, which are those that a recipe of seed 0 tests on and never trains on;
the stereo pair "motorcycle" that scikit-image packages, whose disparity d is the flow (-d, 0); and the same with rows
and columns exchanged, whose flow is vertical. Writes results/flow_pairs.csv: means over the pairs of a kind, over all
pixels with ground truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import cv2
import numpy as np
import skimage.data
import torch
from torch import nn

from benchmarks.report import RESULTS, environment, write_rows
from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.metrics.matching import Errors, flow_errors
from visionattn.opening import open_model

SIZE, LARGEST, SEED = (256, 448), 64.0, 2
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""First and second image, uint8 (H, W, 3), and the flow from the first, float32 (H, W, 2), NaN where unknown."""
Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


def generated(count: int, photographs: list[str]) -> Iterator[Pair]:
    """Generated pairs of seed 2."""
    pairs = GeneratedPairs(count, SIZE, LARGEST, photographs, flow=True, seed=SEED)
    for index in range(count):
        views, fields, _ = pairs[index]
        yield views[0], views[1], fields[0]


def motorcycle(transposed: bool = False) -> Iterator[Pair]:
    """The packaged stereo pair of Middlebury 2014, and with rows and columns exchanged."""
    left, right, disparity = skimage.data.stereo_motorcycle()
    x = -np.where(np.isfinite(disparity), disparity, np.nan)
    flow = np.stack([x, np.where(np.isfinite(x), 0, np.nan)], -1).astype(np.float32)
    if transposed:
        left, right, flow = (np.ascontiguousarray(array.swapaxes(0, 1)) for array in (left, right, flow[..., ::-1]))
    yield left, right, flow


def kinds(count: int, photographs: list[str]) -> Iterator[tuple[str, Iterator[Pair]]]:
    """Name and pairs of each kind."""
    textures = "photographs" if photographs else "procedural textures"
    yield f"{count} generated, {textures}", generated(count, photographs)
    yield "motorcycle", motorcycle()
    yield "motorcycle, transposed", motorcycle(transposed=True)


def dis(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense inverse search (Kroeger et al., ECCV 2016), preset medium."""
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)


def farneback(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Farneback's polynomial expansion (SCIA 2003), settings of OpenCV's tutorial but five levels instead of three."""
    grey: Any = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second)]
    return cv2.calcOpticalFlowFarneback(*grey, None, 0.5, 5, 15, 3, 5, 1.2, 0)


RIVALS: dict[str, Method] = {
    "no motion": lambda first, second: np.zeros((*first.shape[:2], 2), np.float32),
    "DIS": dis,
    "Farneback": farneback,
}


def by_network(network: nn.Module) -> Method:
    """The forward flow of a network of the task "flow"."""

    @torch.inference_mode()
    def run(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        views = [torch.from_numpy(view).permute(2, 0, 1)[None] / 255 for view in (first, second)]
        return network(*views)[0, :2].permute(1, 2, 0).numpy()

    return run


def measure(pairs: Iterator[Pair], methods: dict[str, Method]) -> dict[str, dict[str, float]]:
    """Mean errors of each method over the pairs."""
    found: dict[str, list[Errors]] = {name: [] for name in methods}
    for first, second, truth in pairs:
        for name, method in methods.items():
            found[name].append(flow_errors(method(first, second), truth))
    return {
        name: {key: float(np.mean([asdict(one)[key] for one in errors])) for key in asdict(errors[0])}
        for name, errors in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="LABEL=NAME_OR_FILE")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--photographs", action="append", default=[], metavar="FOLDER")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = dict(RIVALS)
    for label, _, network in (given.rpartition("=") for given in args.networks):
        methods[label or network] = by_network(open_model(network).model.eval())
    rows = []
    for data, pairs in kinds(args.pairs, args.photographs):
        for method, errors in measure(pairs, methods).items():
            values = {key: f"{value:.3f}" for key, value in errors.items()}
            rows.append({"data": data, "method": method, **values, **environment("cpu")})
            print(data, method, *values.values(), sep=" | ", flush=True)
    write_rows(RESULTS / "flow_pairs.csv", rows, ("data", "method"))


if __name__ == "__main__":
    main()
