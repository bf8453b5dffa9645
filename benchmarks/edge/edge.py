"""Small networks compared with their closest peers in ONNX Runtime: size, accuracy, time on 1 and 2 threads, memory.

    python -m benchmarks.edge.edge [--groups span] [--rounds 21] [--spandrel FOLDER]

Ours are exported by `visionattn.export`, peers by their own tool: `timm.utils.onnx.onnx_export` for timm's, and
PyTorch's exporter for spandrel's SPAN, which has none (`--spandrel`: folder of its package, if not installed). All
files have a fixed size and one image; weights are random but for those that ship with this package, since they do not
change the time. The files of a group take turns in every round; `ratio` is the time of ours over that of the file
in the same round, so that above 1 the peer is faster. One thread is timed by the processor time that it takes, two by
the time that passes. `peak_mib` is what a process with ONNX Runtime alone needs for
the file above what it has before: weights, plan and one call on one thread. `accuracy` is quoted from the results of
other scripts. Writes results/edge.csv.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from timm.utils.onnx import onnx_export
from torch import nn

from benchmarks.edge.cases import SEED, Case
from benchmarks.edge.engines import onnx_runtime, paired
from benchmarks.report import RESULTS, environment, read_rows, summarize, write_rows
from visionattn.export import export_onnx
from visionattn.weights.span import to_official

MEMORY = """
import re, sys, numpy, onnxruntime
def kibibytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = kibibytes("VmRSS")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, dict(numpy.load(sys.argv[2])))
print((kibibytes("VmHWM") - before) / 1024)
"""

# Processor time where one thread works, time that passes where two do.
CLOCKS = {1: time.process_time, 2: time.perf_counter}


@dataclass(frozen=True)
class Group:
    """One of our networks and its peers.

    Args:
        ours: The network and its size.
        peers: Names in timm's registry, or "spandrel" for the same SPAN there.
    """

    ours: Case
    peers: tuple[str, ...] = ()


GROUPS = {
    "ulsam": Group(Case("va_mobilenetv2_ulsam_100", (224, 224)), ("mobilenetv2_100", "efficientnet_lite0")),
    "ulsam_small": Group(Case("va_mobilenetv1_ulsam_050", (224, 224)), ("mobilenetv3_small_100",)),
    "minimal_vit": Group(Case("va_minimal_vit_tiny_patch16_224", (224, 224)), ("vit_tiny_patch16_224",)),
    "minimum": Group(
        Case("va_minimal_vit_tiny_patch16_224_minimum", (224, 224)),
        ("edgenext_xx_small", "starnet_s1", "mobilevit_xxs"),
    ),
    "halonet": Group(Case("va_halonet_h0", (256, 256)), ("fastvit_t8", "halonet26t")),
    "span": Group(Case("va_span_ch48_x4", (128, 128)), ("spandrel",)),
    "span_small": Group(Case("va_span_ch26_x4", (180, 240), pretrained=True), ("spandrel",)),
    "micro": Group(Case("va_minimal_vit_micro_patch4_32", (32, 32), pretrained=True)),
    "digits": Group(Case("va_minimal_vit_nano_patch7_28", (28, 28))),
    "halonet_small": Group(Case("va_halonet_nano_32", (32, 32))),
    "stereo": Group(Case("va_match_stereo_nano", (192, 256), pretrained=True, inputs=("left", "right"))),
}
# What the default of timm's exporter, PyTorch's older one, does not take.
BY_DYNAMO = ("halonet26t",)
# Network -> what is quoted: the CSV, the columns that choose the row, the column, the words around the number.
ACCURACY = {
    "va_span_ch26_x4": (
        "span_psnr",
        {"scale": "4", "set": "Set5", "model": "va_span_ch26_x4, shipped"},
        "psnr_y",
        "{} dB (Set5)",
    ),
    "va_match_stereo_nano": (
        "match_stereo_scenes",
        {"model": "va_match_stereo_nano", "options": "", "scene": "tsukuba", "region": "all"},
        "bad_2",
        "{} % bad-2 (Tsukuba)",
    ),
    "va_minimal_vit_micro_patch4_32": (
        "probe_evidence",
        {
            "backbone": "micro ViT, masked autoencoder",
            "data": "cifar10",
            "train_images": "20000",
            "head": "gap",
            "seed": "0",
        },
        "accuracy",
        "{} % (CIFAR-10, linear probe)",
    ),
}


def write_ours(case: Case, folder: Path) -> nn.Module:
    """Export our network to `ours.onnx`, and write its images to `ours.npz`."""
    model = case.network()
    settings = {"input_size": case.size, "dynamic_size": False, "batch": 1, "check": False}
    export_onnx(model, folder / "ours.onnx", **settings)
    np.savez(folder / "ours.npz", **dict(zip(case.inputs, map(np.asarray, case.images()), strict=True)))
    return model


def write_timm(name: str, case: Case, folder: Path) -> nn.Module:
    """Export a network of timm as its documentation says: exportable layers, branches merged where it has some."""
    torch.manual_seed(SEED)
    model = timm.create_model(name, exportable=True).eval()
    model = timm.utils.reparameterize_model(model)
    dynamo = name in BY_DYNAMO
    shape, path = (3, *case.size), str(folder / f"{name}.onnx")
    onnx_export(model, path, batch_size=1, input_size=shape, check=False, use_dynamo=dynamo)
    np.savez(folder / f"{name}.npz", input0=case.images()[0].numpy())
    return model


def write_spandrel(ours: nn.Module, case: Case, folder: Path) -> nn.Module:
    """Export the same SPAN, with the same weights, as spandrel builds it."""
    from spandrel.architectures.SPAN import SPANArch

    model = SPANArch().load(to_official(ours)).model.eval()
    images = case.images()
    torch.onnx.export(model, images, str(folder / "spandrel.onnx"), dynamo=False, input_names=["image"])
    np.savez(folder / "spandrel.npz", image=images[0].numpy())
    return model


def peak_mib(path: Path) -> float:
    """Memory that ONNX Runtime needs for a file: peak of a separate process above its memory before."""
    command = [sys.executable, "-c", MEMORY, path, path.with_suffix(".npz")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def accuracy_of(name: str) -> str:
    """The accuracy of a network whose weights ship, as another script measured it."""
    if name not in ACCURACY:
        return ""
    table, wanted, column, words = ACCURACY[name]
    rows = [row for row in read_rows(RESULTS / f"{table}.csv") if all(row[key] == wanted[key] for key in wanted)]
    return words.format(f"{float(rows[-1][column]):.2f}") if rows else ""


def measure(group: Group, rounds: int, folder: Path) -> list[dict]:
    """Export, measure and give the rows of a group, ours first."""
    case = group.ours
    networks = {"ours": write_ours(case, folder)}
    exporters = {"ours": "visionattn"}
    for peer in group.peers:
        try:
            if peer == "spandrel":
                networks[peer] = write_spandrel(networks["ours"], case, folder)
                exporters[peer] = f"torch.onnx, spandrel {importlib.metadata.version('spandrel')}"
            else:
                networks[peer] = write_timm(peer, case, folder)
                exporters[peer] = f"timm {importlib.metadata.version('timm')}{', dynamo' if peer in BY_DYNAMO else ''}"
        except ImportError as error:
            print(f"without {peer}: {error}", flush=True)
    columns: dict[int, dict] = {}
    for threads in CLOCKS:
        calls: dict[str, Callable] = {}
        for name in networks:
            inputs = dict(np.load(folder / f"{name}.npz"))
            calls[name] = onnx_runtime(folder / f"{name}.onnx", inputs, threads)
        columns[threads] = summarize(paired(calls, rounds, CLOCKS[threads]), "ours")
    rows = []
    for name, network in networks.items():
        path, ours = folder / f"{name}.onnx", name == "ours"
        times = {
            f"{key}_{threads}": columns[threads][name][key] for threads in CLOCKS for key in columns[threads][name]
        }
        rows.append(
            {
                "compared_with": case.name,
                "model": case.name if ours else f"spandrel SPAN, {case.name}" if name == "spandrel" else name,
                "input": f"{case.size[0]}x{case.size[1]}",
                "exporter": exporters[name],
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "bytes": path.stat().st_size,
                "nodes": len(onnx.load(path).graph.node),
                "weights": "shipped" if case.pretrained and (ours or name == "spandrel") else "random",
                "accuracy": accuracy_of(case.name) if ours else "",
                **times,
                "peak_mib": f"{peak_mib(path):.1f}",
                "rounds": rounds,
                "onnxruntime": importlib.metadata.version("onnxruntime"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--spandrel", help="folder of the package spandrel")
    args = parser.parse_args()
    if args.spandrel:
        sys.path.append(args.spandrel)
    torch.set_num_threads(1)
    origin = environment("cpu")  # before rows change the checkout
    for name in args.groups:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            rows = [row | origin | {"seed": SEED} for row in measure(GROUPS[name], args.rounds, Path(folder))]
        for row in rows:
            print(*(row[key] for key in list(row)[1:17]), sep=" | ", flush=True)
        write_rows(RESULTS / "edge.csv", rows, key=("device", "compared_with", "model"))


if __name__ == "__main__":
    main()
