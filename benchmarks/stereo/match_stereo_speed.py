"""MatchStereo on a CPU: nano and tiny in PyTorch and ONNX Runtime, and the authors' code, one stereo pair per call.

    python -m benchmarks.stereo.match_stereo_speed [--reference FOLDER] [--size 1248x384] [--repeats 5] [--threads 2]

FOLDER is a checkout of the authors' repository, whose PyTorch form then runs too, tiny with the same weights as ours.
Weights are random, the pair is a photograph and the same moved by 24 pixels. The start's projections are enlarged:
untrained ones find all matches equally good, so that rounding would choose. Nothing is timed before half of all
disparities agree to a thousandth of a pixel; where rounding still turns a decision, the largest difference is more.
Peak memory is what a call needs above what was held before it, in a process of its own for each engine.
Writes results/match_stereo_speed.csv.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import timm
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

import visionattn  # noqa: F401  registers the names
from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from benchmarks.stereo import match_stereo_authors
from visionattn.cost import count_parameters
from visionattn.export import export_onnx

NANO, TINY = "va_match_stereo_nano", "va_match_stereo_tiny"
SHIFT = 24
TOLERANCE = 1e-3  # pixels
FIRST = (224, 192)  # size of a first call, which loads libraries
Engine = Callable[[], Tensor]


def pair(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Left and right view, (1, 3, height, width) in 0..1."""
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    # Enlarged rather than repeated: a repeated one has several equal matches.
    image = F.interpolate(image, (height, width + SHIFT), mode="bicubic").clamp(0, 1)
    return image[..., :width].contiguous(), image[..., SHIFT : width + SHIFT].contiguous()


def authors_network(folder: Path) -> nn.Module:
    match_stereo_authors.use(folder)
    return decided(match_stereo_authors.network(), "init_correlation_volume")


def decided(model: nn.Module, start: str) -> nn.Module:
    """Let matches at the start differ clearly."""
    with torch.no_grad():
        for part in ("q", "k"):
            model.get_parameter(f"{start}.{part}.weight").mul_(6)
    return model.eval()


def network(name: str, reference: Path | None) -> nn.Module:
    torch.manual_seed(0)
    model = decided(timm.create_model(name), "start").requires_grad_(False)
    if name == TINY and reference:
        model.load_state_dict(authors_network(reference).state_dict())
    return model


def eager(name: str, reference: Path | None, size: tuple[int, int]) -> Engine:
    model, views = network(name, reference), pair(*size)

    def call() -> Tensor:
        with torch.inference_mode():
            return model(*views)

    return call


def onnx_runtime(path: Path, size: tuple[int, int]) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {given.name: np.asarray(view) for given, view in zip(session.get_inputs(), pair(*size), strict=True)}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


def authors(reference: Path, size: tuple[int, int]) -> Engine:
    model, views = authors_network(reference), [255 * view for view in pair(*size)]

    def call() -> Tensor:
        with torch.inference_mode():
            x = model(*views, stereo=True)["field_up"][..., 0]
        return torch.stack([-x[:1], x[1:]], 1).clamp(min=0)

    return call


def engine(name: str, kind: str, reference: Path | None, folder: Path, size: tuple[int, int]) -> Engine:
    if kind == "ours":
        return eager(name, reference, size)
    if kind == "onnxruntime":
        return onnx_runtime(folder / f"{name}.onnx", size)
    assert reference
    return authors(reference, size)


def peak_mib(name: str, kind: str, reference: Path | None, folder: Path, size: tuple[int, int], threads: int) -> float:
    """Most memory of one call above what was held before it, of this process; Linux alone tells."""
    torch.set_num_threads(threads)
    engine(name, kind, reference, folder, FIRST)()
    call = engine(name, kind, reference, folder, size)
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    before = held("VmRSS")
    call()
    return held("VmHWM") - before


def held(what: str) -> float:
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="checkout of the authors' repository")
    parser.add_argument("--size", default="1248x384", metavar="WIDTHxHEIGHT")
    parser.add_argument("--models", nargs="+", default=[NANO, TINY], choices=[NANO, TINY])
    parser.add_argument("--repeats", type=int, default=5, help="rounds, 2 or more")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kinds = [(name, kind) for name in args.models for kind in ("ours", "onnxruntime")]
        if args.reference and TINY in args.models:
            kinds.append((TINY, "authors"))
        for name in args.models:
            print(f"{name}: exporting", flush=True)
            export_onnx(network(name, args.reference), folder / f"{name}.onnx", check=False)
        common = {"reference": args.reference, "folder": folder, "size": (width, height)}
        peaks = {}
        for name, kind in kinds:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peaks[name, kind] = pool.submit(peak_mib, name, kind, **common, threads=args.threads).result()
        calls = {(name, kind): engine(name, kind, **common) for name, kind in kinds}
        outputs = {key: call() for key, call in calls.items()}
        errors = {(name, kind): (out - outputs[name, "ours"]).abs() for (name, kind), out in outputs.items()}
        for (name, kind), error in errors.items():
            if not error.median() < TOLERANCE:
                raise SystemExit(f"{kind} of {name} is off by {error.median():.1g} pixels in half of them.")
        times = paired_milliseconds(calls, "cpu", args.repeats, warm_up=0)
    baseline = (TINY, "authors") if (TINY, "authors") in times else (args.models[-1], "ours")
    rows = []
    for (name, kind), columns in summarize(times, baseline).items():
        rows.append(
            {
                "model": name,
                "input": args.size,
                "engine": kind,
                "parameters": count_parameters(timm.create_model(name, device="meta")),
                **columns,
                "ratio_to": " ".join(baseline),
                "peak_mib": f"{peaks[name, kind]:.0f}",
                "median_error_px": f"{errors[name, kind].median():.1e}",
                "max_error_px": f"{errors[name, kind].max():.1e}",
                "threads": args.threads,
                "seed": 0,
                **environment("cpu"),
            }
        )
        print(*list(rows[-1].values())[:10], sep=" | ", flush=True)
    write_rows(RESULTS / "match_stereo_speed.csv", rows, key=("device", "model", "input", "engine", "threads"))


if __name__ == "__main__":
    main()
