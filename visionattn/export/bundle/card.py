"""The card of a bundle, as JSON and Markdown: description, quality loss, cost and origin of the files."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import numpy as np

import visionattn
from visionattn.export.check import TOLERANCE
from visionattn.export.inspect.running import Cost, measure_cost
from visionattn.export.inspect.structure import read_structure
from visionattn.export.onnx import OnnxFile
from visionattn.export.runtime import OnnxModel
from visionattn.export.spec import ExportSpec, size_text
from visionattn.export.variants import Variant
from visionattn.weights import SHIPPED
from visionattn_runtime import load
from visionattn_runtime.verify import FORMAT, sample_error

__all__ = ["describe_file", "license_text", "list_files", "make_card", "weights_card", "write_readme"]

THREADS = (1, 2)
PACKAGES = ("numpy", "onnx", "onnxruntime", "torch")


def make_card(spec: ExportSpec, variants: list[dict[str, Any]], sample: dict[str, Any], data: str) -> dict[str, Any]:
    """The card without its list of files.

    Args:
        spec: The metadata of the float32 file.
        variants: Output of `describe_file` for each file.
        sample: Paths of the images and of the expected result, and origin of the images.
        data: Name of the data that the variants were measured on.
    """
    return {
        "format": FORMAT,
        "name": spec.model,
        "task": spec.task,
        "weights": spec.weights,
        "license": spec.license,
        "labels": spec.labels,
        "sample": sample,
        "measured_on": data,
        "device": _processor(),
        "versions": {"visionattn": visionattn.__version__, **{name: version(name) for name in PACKAGES}},
        "variants": variants,
    }


def describe_file(
    file: OnnxFile, variant: Variant | None, path: Path, folder: Path, expected: np.ndarray, images: Sequence[Path]
) -> dict[str, Any]:
    """Measure one file and return its entry of the card.

    Args:
        file: The exported file.
        variant: Its variant at `path`; None without variants, or for a pair of files.
        path: The file; for a pair, its common name.
        folder: The bundle.
        expected: PyTorch's result for the sample.
        images: The sample.
    """
    model = load(path, threads=1)
    error = sample_error(model.predict(*images), expected)
    spread = float(np.nanmax(expected) - np.nanmin(expected))
    parts = [path] if path.exists() else [path.with_suffix(".tower.onnx"), path.with_suffix(".head.onnx")]
    spec = OnnxModel(parts[0]).spec
    structure, _ = read_structure(parts[0])
    costs = measure_cost(parts[0], structure, spec, (spec.input_size[1], spec.input_size[2]), THREADS)
    return {
        "file": path.relative_to(folder).as_posix(),
        "precision": spec.precision or "fp32",
        "bytes": sum(part.stat().st_size for part in parts),
        "nodes": structure.nodes,
        "metadata": model.texts,
        "error": error,
        # Twice the error found here, plus rounding: another processor sums in another order.
        "allowed": 2 * error + TOLERANCE[0] + TOLERANCE[1] * spread,
        "quality": asdict(variant.quality) if variant and variant.quality else None,
        "speed": variant.speed if variant else 1.0,
        "recommended": variant.recommended if variant else True,
        "kept_in_float": list(variant.kept) if variant else [],
        "checks": len(file.rows),
        "cost": [_cost(cost) for cost in costs],
    }


def _cost(cost: Cost) -> dict[str, Any]:
    numbers = {"milliseconds": cost.milliseconds, "spread": cost.spread}
    return {"threads": cost.threads, "runs": cost.runs, "peak_bytes": cost.peak_bytes, **numbers}


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a bundle."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    }


def write_readme(card: dict[str, Any], spec: ExportSpec) -> str:
    """The card in Markdown."""
    size = size_text(*spec.input_size[1:])
    quality = [variant["quality"] for variant in card["variants"] if variant["quality"]]
    metric = f" {quality[0]['metric']} | speed |" if quality else ""
    head = f"| file | numbers | kB | error |{metric}" + "".join(f" {n} thread{'s' * (n > 1)}, ms |" for n in THREADS)
    rows = [_row(variant, bool(quality)) for variant in card["variants"]]
    dashes = "| --- | --- |" + " ---: |" * (head.count("|") - 3)
    weak = [v["file"] for v in card["variants"] if not v["recommended"]]
    lines = [
        f"# {card['name']}",
        f"Task: {card['task']}. Weights: {card['weights']}. Licence of the weights: {card['license']} (`LICENSE`).",
        f"Input: {', '.join(spec.input_names)}, {spec.input_order}, {size}"
        + (" or another size" if spec.dynamic_size else "")
        + f"; output: {'embeddings' if spec.pair else ', '.join(spec.output_names)}. The files' metadata state the "
        "preprocessing of images.",
        *([_pair_text(spec)] if spec.pair else []),
        "\n".join([head, dashes, *rows]),
        "error: largest deviation from PyTorch's result for the sample, over 99.9 % of its values."
        + (f" {quality[0]['metric']}: on {card['measured_on']}; speed: paired runs, one thread." if quality else "")
        + f" Times: one image of {size}, median, on {card['device']}, ONNX Runtime {card['versions']['onnxruntime']}.",
        *([f"Not recommended, since there is no gain on this device: {', '.join(weak)}."] if weak else []),
        f"`sample/`: {card['sample']['source']}, and PyTorch's result for it.",
        "## Use\n\nWithout PyTorch: `pip install numpy pillow onnxruntime`, then\n\n"
        f"    python run.py {_arguments(card, spec)}\n    python run.py --verify\n\n"
        "The first command runs a file, the second verifies this folder: hashes, metadata, and each file's result for "
        "the sample. In Python: `from visionattn_runtime import load`. `run.mjs` is for browsers and Node, `run.cpp` "
        "for C++.",
    ]
    return "\n\n".join(lines) + "\n"


def _pair_text(spec: ExportSpec) -> str:
    return (
        "`model.onnx` is the common name of `model.tower.onnx`, from an image to tokens, and `model.head.onnx`, from "
        f"tokens and attributes' ids to embeddings of length 1. Attributes: {', '.join(spec.attributes or [])}. Times "
        "are those of the tower."
    )


def _row(variant: dict[str, Any], quality: bool) -> str:
    cells = [f"`{variant['file']}`", variant["precision"], f"{variant['bytes'] / 1000:,.0f}", f"{variant['error']:.1g}"]
    if quality:
        cells += [f"{variant['quality']['value']:.5g}" if variant["quality"] else "", f"x{variant['speed']:.2f}"]
    times = {cost["threads"]: f"{cost['milliseconds']:.1f}" for cost in variant["cost"]}
    return f"| {' | '.join([*cells, *(times.get(count, '') for count in THREADS)])} |"


def _arguments(card: dict[str, Any], spec: ExportSpec) -> str:
    images = " ".join(card["sample"]["images"])
    output = {"restore": "result.png", "stereo": "disparity.png", "segment": "mask.png"}
    if spec.task in ("multilabel", "regress") or (spec.task == "classify" and spec.num_classes):
        return f"{card['variants'][0]['file']} {images}"  # printed
    return f"{card['variants'][0]['file']} {images} --output {output.get(spec.task, 'result.npy')}"


def license_text(spec: ExportSpec) -> str:
    """The licence of the weights, and the text of Apache-2.0, the licence of everything else."""
    text = distribution("visionattn").read_text("licenses/LICENSE") or "https://www.apache.org/licenses/LICENSE-2.0\n"
    return f"Weights ({spec.weights}): {spec.license}.\nRunner and samples of code: Apache-2.0, as follows.\n\n{text}"


def weights_card(spec: ExportSpec) -> str | None:
    """The card of weights shipped with this package: data, command, results; None for other weights."""
    path = SHIPPED / f"{spec.model}.md"
    shipped = spec.weights.endswith(f"{spec.model}.safetensors") and path.is_file()
    return path.read_text(encoding="utf-8") if shipped else None


def _processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
