"""The README's table of headline figures, from the CSV files of all rooms."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows


def headlines() -> str:
    """A row for each task: what was measured, what it is compared with, and under which conditions."""
    head = ["task", "visionattn", "compared with", "conditions"]
    return markdown(
        head, [_upscaling(), _compressed(), _int8(), _stereo(), _stereo_speed(), _probing(), _halo(), _search()]
    )


def _find(name: str, **cells: str) -> dict[str, str]:
    """The first row of results/NAME.csv with these cells."""
    for row in read_rows(RESULTS / f"{name}.csv"):
        if all(row[key] == value for key, value in cells.items()):
            return row
    raise LookupError(f"results/{name}.csv has no row with {cells}")


def _upscaling() -> list[str]:
    ours, bicubic, published = (
        _find("span_psnr", scale="4", set="Set14", model=model)
        for model in ("va_span_ch26_x4, shipped", "bicubic", "team39_spantiny_ch26_slim")
    )
    rivals = [f"{float(row['psnr_y']):.2f} dB" for row in (bicubic, published)]
    return [
        "Upscaling ×4",
        f"{float(ours['psnr_y']):.2f} dB",
        f"bicubic: {rivals[0]}; **published SPAN of the same size: {rivals[1]}**",
        f"`va_span_ch26_x4`, {int(ours['parameters']):,} parameters, shipped weights; PSNR on Y, Set14",
    ]


def _compressed() -> list[str]:
    name = "va_span_ch26_x4.real"
    ours, bicubic, published = (
        _find("shipped_weights", weights=name, data="Set14, JPEG 75", method=method)
        for method in (name, "bicubic", "team39_spantiny_ch26_slim")
    )
    values = [f"{float(row['value']):.2f} dB" for row in (ours, bicubic, published)]
    return [
        "The same after JPEG of quality 75",
        values[0],
        f"bicubic: {values[1]}; published SPAN of the same size, for clean images: {values[2]}",
        f"`{name}`, shipped weights for compressed photographs; Set14",
    ]


def _int8() -> list[str]:
    ours, float32 = (_find("edge_variants", model="va_span_ch26_x4", variant=variant) for variant in ("int8", "fp32"))
    return [
        "Upscaling ×4 in int8 ONNX",
        f"{float(ours['value']):.2f} dB, {int(ours['bytes']) / 1000:.0f} kB, {float(ours['speed']):.2f}× the speed",
        f"float32: {float(float32['value']):.2f} dB, {int(float32['bytes']) / 1000:.0f} kB",
        f"{ours['data']}; ONNX Runtime {ours['onnxruntime']}, 1 CPU thread",
    ]


def _stereo() -> list[str]:
    rows = [row for row in read_rows(RESULTS / "match_stereo_scenes.csv") if row["region"] == "all"]

    def mean(model: str, options: str = "") -> float:
        return statistics.fmean(float(r["bad_2"]) for r in rows if (r["model"], r["options"]) == (model, options))

    scenes, options = len({row["scene"] for row in rows}), "--enlarge 2 --fill"
    return [
        "Stereo matching",
        f"{mean('va_match_stereo_nano', options):.1f} % of pixels off by more than 2",
        f"**OpenCV's semi-global matching with gaps filled: {mean('sgbm_filled'):.1f} %**",
        f"`va_match_stereo_nano`, shipped weights, `{options}`; mean of {scenes} Middlebury scenes",
    ]


def _stereo_speed() -> list[str]:
    ours = _find("match_stereo_speed", model="va_match_stereo_tiny", engine="ours")
    theirs = _find(
        "match_stereo_speed", model="va_match_stereo_tiny", engine="authors", git_revision=ours["git_revision"]
    )
    times = [f"{float(row['median_ms']) / 1000:.1f} s, {row['peak_mib']} MiB" for row in (ours, theirs)]
    return [
        "MatchStereo on a CPU",
        times[0],
        f"the authors' PyTorch code: {times[1]}",
        f"`va_match_stereo_tiny`, {ours['input'].replace('x', ' × ')} pixels, float32, {ours['threads']} threads",
    ]


def _probing() -> list[str]:
    backbone = {"backbone": "micro ViT, masked autoencoder", "data": "cifar10"}
    ours, linear = (_find("probe_evidence", head=head, **backbone) for head in ("ep_32", "gap"))
    accuracies = [f"{row['accuracy']} % ({row['low']} to {row['high']})" for row in (ours, linear)]
    return [
        "Efficient probing",
        accuracies[0],
        f"linear probe of the mean token: {accuracies[1]}",
        f"frozen `va_minimal_vit_micro_patch4_32`; CIFAR-10, {int(ours['train_images']):,} training images, 1 seed",
    ]


def _halo() -> list[str]:
    case = "1x64x256x256, 4 heads of 16, block 8, halo 3"
    ours, timm = (
        _find("halo_attention", **{"case": case, "pass": "inference", "dtype": "float32", "implementation": one})
        for one in ("operator", "timm")
    )
    costs = [f"{float(row['median_ms']):.0f} ms, {float(row['peak_mib']):.0f} MiB" for row in (ours, timm)]
    network = _find("halo_attention", **{"case": "halonet26t", "pass": "inference", "implementation": "accelerated"})
    return [
        "Halo attention layer",
        costs[0],
        f"timm's layer: {costs[1]}; **a whole `halonet26t` gains little: {float(network['ratio']):.2f}×**",
        f"64 channels, 256 × 256 pixels, float32, {ours['threads']} CPU thread",
    ]


def _search() -> list[str]:
    ours, exact = (_find("search_scale", images="1000000", kind=kind) for kind in ("ivf", "exact"))
    return [
        "Image search",
        f"{float(ours['median_ms']):.1f} ms, {100 * float(ours['recall_at_10']):.1f} % of the 10 nearest",
        f"exact search: {float(exact['median_ms']):.0f} ms",
        f"IVF of Faiss, {int(ours['images']):,} vectors of {ours['dimensions']} values, {ours['threads']} CPU thread",
    ]


TABLES: dict[str, Callable[[], str]] = {"headlines": headlines}
