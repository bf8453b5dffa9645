"""What an index costs: generated vectors of 100,000 images and six attributes, built, saved, loaded and searched.

    python -m benchmarks.retrieval.search_index

Vectors of 128 values form 2,000 clusters. `search` finds 12 images for one query, by one attribute, by a mix of
two and of all six; torch's exact search of the same matrix, `topk` of a product, is measured too. `load` is of all six
attributes. Search is timed in turns; build, save and load five times each. Writes results/search_index.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.report import RESULTS, environment, paired_milliseconds, write_rows
from visionattn.search.image_index import ImageIndex, write_index

ATTRIBUTES = ("colour", "kind", "cut", "length", "pattern", "season")
DIMENSIONS, CLUSTERS, TOP = 128, 2000, 12


def vectors(count: int) -> np.ndarray:
    """float32 (N, C, E), L2-normalised."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((CLUSTERS, len(ATTRIBUTES), DIMENSIONS), np.float32)
    found = centres[generator.integers(0, CLUSTERS, count)]
    found += 0.5 * generator.standard_normal(found.shape, np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def timed(function: object, repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()  # type: ignore[operator]
        found.append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / "search_index.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    made = vectors(args.count)
    query = made[args.count // 2]
    manifest = {"model": "generated", "weights": "", "input": {}, "conditions": ATTRIBUTES, "folder": ""}
    manifest["images"] = [f"{number:06d}.jpg" for number in range(args.count)]
    steps: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)

        def build() -> None:
            for column in range(len(ATTRIBUTES)):
                faiss.IndexFlatIP(DIMENSIONS).add(np.ascontiguousarray(made[:, column]))

        def load() -> ImageIndex:
            index = ImageIndex(path)
            for name in ATTRIBUTES:
                index.search(query, {name: 1.0}, 1)
            return index

        steps["build in memory"] = timed(build, 5)
        steps["build and save"] = timed(lambda: write_index(path, made, manifest), 5)
        steps["load and search each once"] = timed(load, 5)
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        index = load()
        matrix = torch.from_numpy(np.ascontiguousarray(made[:, 0]))
        functions = {
            "search by one": lambda: index.search(query, {"colour": 1.0}, TOP),
            "search by one, torch": lambda: (matrix @ torch.from_numpy(query[0])).topk(TOP),
            "search by a mix of two": lambda: index.search(query, {"colour": 1.0, "kind": 0.5}, TOP),
            "search by a mix of six": lambda: index.search(query, dict.fromkeys(ATTRIBUTES, 1.0), TOP),
        }
        assert index.search(query, {"colour": 1.0}, 1)[0].image == manifest["images"][args.count // 2]
        steps |= paired_milliseconds(functions, "cpu", args.repeats)
    rows = []
    for step, values in steps.items():
        low, median, high = statistics.quantiles(values, n=4)
        columns = {"median_ms": f"{median:.2f}", "iqr_ms": f"{high - low:.2f}", "size_mib": f"{size:.0f}", "threads": 1}
        rows.append(
            {"images": args.count, "attributes": len(ATTRIBUTES), "step": step, **columns, **environment("cpu")}
        )
        print(f"{step}: {median:.2f} ms")
    write_rows(args.output, rows, key=("images", "step", "device"))


if __name__ == "__main__":
    main()
