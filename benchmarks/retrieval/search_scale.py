"""What search costs in very many vectors: exact, by HNSW and by IVF, their recall, memory and time.

    python -m benchmarks.retrieval.search_scale [--count 1000000]

Vectors of 256 numbers lie near 32 directions, in clusters of 500 on average, which overlap and are of different width;
queries are further members. Recall is the share of the 10 nearest that are found, against all vectors compared in
float32. Latency is of one query at a time, one thread, with the order by float32 vectors as `visionattn search` has it;
the kinds take turns. Building takes all threads of `--threads`. Peak memory is of the process until then, the vectors
included. Writes results/search_scale.csv; a million take about 4 GiB.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.report import RESULTS, environment, paired_milliseconds, write_rows
from visionattn.search.nearest import build, find_candidates

DIMENSIONS, LATENT, EACH, TOP, QUERIES = 256, 32, 500, 10, 500
BLOCK = 2**16


def vectors(count: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 (N, E) and (Q, E), L2-normalised."""
    generator = np.random.default_rng(0)
    clusters = max(1, count // EACH)
    basis = generator.standard_normal((LATENT, DIMENSIONS), np.float32) / np.float32(LATENT**0.5)
    centres = generator.standard_normal((clusters, LATENT), np.float32)
    widths = generator.uniform(0.4, 1.2, clusters).astype(np.float32)
    found = np.empty((count + queries, DIMENSIONS), np.float32)
    for start in range(0, len(found), BLOCK):
        own = generator.integers(0, clusters, min(BLOCK, len(found) - start))
        latent = centres[own] + widths[own, None] * generator.standard_normal((len(own), LATENT), np.float32)
        part = latent @ basis + 0.2 * generator.standard_normal((len(own), DIMENSIONS), np.float32)
        found[start : start + len(own)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found[:count], found[count:]


def nearest(made: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Positions (Q, TOP) of the nearest vectors, all compared."""
    best = np.full((len(queries), TOP), -2, np.float32)
    places = np.zeros((len(queries), TOP), np.int64)
    for start in range(0, len(made), BLOCK):
        cosines = np.concatenate([best, queries @ made[start : start + BLOCK].T], 1)
        known = np.concatenate(
            [places, np.tile(np.arange(start, start + cosines.shape[1] - TOP), (len(queries), 1))], 1
        )
        order = np.argpartition(-cosines, TOP, 1)[:, :TOP]
        best, places = np.take_along_axis(cosines, order, 1), np.take_along_axis(known, order, 1)
    return places


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2, help="that build")
    parser.add_argument("--kinds", nargs="+", default=["exact", "ivf", "hnsw"])
    parser.add_argument("--output", type=Path, default=RESULTS / "search_scale.csv")
    args = parser.parse_args()
    where = environment("cpu")
    made, queries = vectors(args.count, QUERIES)
    torch.set_num_threads(1)
    true = nearest(made, queries)
    rows, functions = [], {}
    turn = {kind: 0 for kind in args.kinds}
    for kind in args.kinds:
        faiss.omp_set_num_threads(args.threads)
        start = time.perf_counter()
        if kind == "exact":
            index = faiss.IndexFlatIP(DIMENSIONS)
            index.add(made)
            size = made.nbytes

            def find(query: np.ndarray, index: faiss.Index = index) -> np.ndarray:
                return index.search(query[None], TOP)[1][0]
        else:
            candidates = build(made, kind)
            size = faiss.serialize_index(candidates.index).nbytes

            def find(query: np.ndarray, candidates: object = candidates) -> np.ndarray:
                return find_candidates(candidates, query, made, TOP)

        seconds = time.perf_counter() - start
        faiss.omp_set_num_threads(1)
        recall = np.mean([len(set(find(query)) & set(own)) / TOP for query, own in zip(queries, true.tolist())])

        def one(kind: str = kind, find: object = find) -> None:
            turn[kind] = (turn[kind] + 1) % len(queries)
            find(queries[turn[kind]])

        functions[kind] = one
        rows.append(
            {
                "images": args.count, "dimensions": DIMENSIONS, "kind": kind, "recall_at_10": f"{recall:.4f}",
                "build_seconds": f"{seconds:.1f}", "build_threads": args.threads, "size_mib": f"{size / 2**20:.0f}",
                "peak_mib": f"{peak_mib():.0f}",
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    for row, values in zip(rows, paired_milliseconds(functions, "cpu", 200).values()):
        low, median, high = statistics.quantiles(values, n=4)
        row |= {"median_ms": f"{median:.2f}", "iqr_ms": f"{high - low:.2f}", "threads": 1, "faiss": faiss.__version__}
        row |= where
        print(f"{row['kind']}: {median:.2f} ms")
    write_rows(args.output, rows, key=("images", "kind", "device"))


if __name__ == "__main__":
    main()
