"""Super-resolution as reported on Set5, Set14 and B100: PSNR and SSIM on Y, compared with bicubic upscaling.

The high-resolution image is cropped from the top left to a multiple of the scale r; grey is replicated to RGB. The
low-resolution image is its bicubic downscaling as in MATLAB (`visionattn.data.restore.bicubic`), or a file. The
network's output is multiplied by 255, clipped, and rounded half up. Metrics are computed on Y after r pixels are
cropped from each side (`visionattn.metrics.luma`). PSNR has the peak 255. SSIM (Wang et al., 2004) has a Gaussian
window of 11 pixels and sigma 1.5, C1 = 2.55^2 and C2 = 7.65^2, and is averaged where the window is inside the image.
The score of a data set is the mean over its images.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from visionattn import __version__
from visionattn.data.images import find_images, pair_by_name, read_rgb
from visionattn.data.restore.bicubic import crop_to_multiple, downscale, upscale
from visionattn.data.restore.degradation import compress
from visionattn.devices import find_device
from visionattn.errors import ConfigError, DataError, InputError, VisionAttnError, require, shorten
from visionattn.evaluate.opening import open_models, place
from visionattn.files import atomic_path
from visionattn.metrics.luma import STRIP, cut_border, luma, psnr_y, to_uint8
from visionattn.moved import renamed_keywords
from visionattn.progress import counted

__all__ = ["Measured", "Measurements", "evaluate_sr", "ssim_y"]

BICUBIC = "bicubic"
SIDE = 512  # side of the tiles of a low-resolution image, in pixels
WINDOW = 11  # of SSIM
PAUSE = 5.0  # seconds between two writes of the finished rows


@dataclass(frozen=True)
class Measured:
    """One model on one image: PSNR in dB and SSIM, both on Y."""

    model: str
    scale: int
    picture: str
    psnr_y: float
    ssim_y: float


@dataclass
class Measurements:
    """Result of `evaluate_sr`.

    Attributes:
        rows: One row per image and model, bicubic first.
        failures: One error line per image that could not be measured.
        folder: Folder of the images.
        device: Device of the models.
        dtype: Precision of the models.
        jpeg: JPEG quality of the low-resolution images; None without JPEG.
    """

    folder: str
    device: str
    dtype: str
    jpeg: int | None = None
    rows: list[Measured] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def means(self) -> list[Measured]:
        """Each model's mean over the images."""
        found = []
        for model in dict.fromkeys(row.model for row in self.rows):
            own = [row for row in self.rows if row.model == model]
            psnr, ssim = (float(np.mean([getattr(row, key) for row in own])) for key in ("psnr_y", "ssim_y"))
            found.append(Measured(model, own[0].scale, f"mean of {len(own)}", psnr, ssim))
        return found

    def table(self) -> Table:
        """One row per image and for the mean, one column per model."""
        means = self.means()
        table = Table("image")
        for mean in means:
            table.add_column(Path(mean.model).name, justify="right")
        found = {(row.model, row.picture): f"{row.psnr_y:.3f} / {row.ssim_y:.4f}" for row in self.rows}
        for picture in dict.fromkeys(row.picture for row in self.rows):
            table.add_row(picture, *(found.get((mean.model, picture), "") for mean in means))
        table.add_section()
        table.add_row("mean", *(f"{mean.psnr_y:.3f} / {mean.ssim_y:.4f}" for mean in means))
        return table

    def write(self, path: str | Path) -> None:
        """Write all rows and means as CSV.

        Raises:
            StorageError: The file could not be written.
        """
        origin = {
            "folder": self.folder,
            "device": self.device,
            "dtype": self.dtype,
            "jpeg": self.jpeg,
            "torch": torch.__version__,
            "visionattn": __version__,
        }
        with (
            atomic_path(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.DictWriter(file, [*Measured.__dataclass_fields__, *origin])
            writer.writeheader()
            for row in [*self.rows, *self.means()]:
                rounded = {"psnr_y": f"{row.psnr_y:.4f}", "ssim_y": f"{row.ssim_y:.5f}"}
                writer.writerow({**asdict(row), **rounded, **origin})


@renamed_keywords(small_folder="low_resolution")
def evaluate_sr(
    models: str | Path | nn.Module | Sequence[str | Path | nn.Module],
    folder: str | Path,
    *,
    low_resolution: str | Path | None = None,
    scale: int | None = None,
    jpeg: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    console: Console | None = None,
    output: str | Path | None = None,
) -> Measurements:
    """Evaluate models of one scale on a folder of high-resolution images, compared with bicubic upscaling.

    Args:
        models: One or several, each a name with pretrained weights, a weight file, or a module that takes RGB
            (B, 3, H, W) in 0..1 and states its `scale`. An empty list evaluates bicubic only.
        folder: High-resolution images (png, jpg, webp, bmp, tiff).
        low_resolution: Folder of low-resolution images of the same names. Default: MATLAB's bicubic downscaling.
        scale: Factor r. Default: that of the models.
        jpeg: Quality, 1 to 100, at which low-resolution images are compressed to JPEG (4:2:0 chroma subsampling) before
            models and bicubic upscaling. Default: no JPEG.
        device: Device of the models: "auto" (a GPU if available), "cpu" or "cuda:1".
        dtype: Precision of weights and activations: float32, float16, bfloat16 or float64.
        console: Console for a progress bar. Default: no progress bar.
        output: CSV file for the rows; an existing one is replaced. It is updated during the run, so that an interrupted
            run keeps its finished rows.

    Returns:
        All rows; images that could not be measured are listed in `failures`.

    Raises:
        ConfigError: A model has another task or does not take RGB; the models have different scales; no scale is
            given; the JPEG quality is out of range; or the device or dtype does not exist.
        CheckpointError: A weight file is unreadable or fits no model, or no weights are available for a name.
        DataError: The folder has no images, or the folder of low-resolution images lacks some.
        MissingPackageError: scikit-image is not installed.
        StorageError: The rows could not be written.
    """
    require("skimage.metrics", "images")
    if jpeg is not None and not 1 <= jpeg <= 100:
        raise ConfigError(f"The JPEG quality must be from 1 to 100; got {jpeg}.")
    files = find_images(folder)
    networks = open_models(models, ("restore", None))  # a module need not state its task
    for label, network in networks.items():
        _check_upscaler(label, network)
    scale = _common_scale(networks, scale)
    small_files = pair_by_name(files, low_resolution, scale) if low_resolution is not None else [None] * len(files)
    device = str(find_device(device))
    networks = place(networks, device, dtype)
    found = Measurements(str(folder), device, dtype, jpeg)
    saved = time.monotonic()
    try:
        with counted("images", len(files), console) as advance:
            for file, small_file in zip(files, small_files):
                try:
                    # An image counts for all models or for none: otherwise means would not be comparable.
                    found.rows += _measure(file, small_file, scale, jpeg, networks)
                except VisionAttnError as error:
                    found.failures.append(str(error) if shorten(file) in str(error) else f"{shorten(file)}: {error}")
                except (MemoryError, RuntimeError) as error:  # PyTorch raises the latter for nearly anything
                    found.failures.append(f"{shorten(file)}: {shorten(error) or 'not enough memory'}")
                advance(1)
                if output is not None and found.rows and time.monotonic() - saved > PAUSE:
                    found.write(output)
                    saved = time.monotonic()
    finally:
        if output is not None and found.rows:
            found.write(output)
    return found


def _measure(
    file: Path, small_file: Path | None, scale: int, jpeg: int | None, networks: dict[str, Any]
) -> list[Measured]:
    large, small = _pair(file, small_file, scale)
    if jpeg is not None:
        small = compress(small, jpeg)
    rows = []
    for label in (BICUBIC, *networks):
        output = upscale(small, scale) if label == BICUBIC else _run(networks[label], small)
        psnr, ssim = psnr_y(output, large, scale), ssim_y(output, large, scale)
        rows.append(Measured(label, scale, file.name, psnr, ssim))
    return rows


def ssim_y(first: np.ndarray, second: np.ndarray, border: int) -> float:
    """SSIM of two uint8 RGB images (H, W, 3) on Y, after `border` pixels are cropped from each side.

    Raises:
        InputError: The cropped image is smaller than the window of 11 pixels.
    """
    first, second = cut_border(first, border), cut_border(second, border)
    height, width = first.shape[:2]
    if min(height, width) < WINDOW:
        raise InputError(
            f"An image of {height + 2 * border} x {width + 2 * border} pixels is too small for SSIM's window of "
            f"{WINDOW} with a border of {border}."
        )
    metrics = require("skimage.metrics", "images")
    # A whole image in float64 would take a hundred times its memory: use strips, which overlap by the window.
    rows = max(STRIP // width, 1)
    total = 0.0
    for top in range(0, height - WINDOW + 1, rows):
        bottom = min(top + rows, height - WINDOW + 1)
        y1, y2 = (luma(image[top : bottom + WINDOW - 1]) for image in (first, second))
        # scikit-image averages where the window is inside the image; truncated at 3.5 sigma it has 11 pixels.
        mean = metrics.structural_similarity(
            y1, y2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        total += float(mean) * (bottom - top)
    return total / (height - WINDOW + 1)


def _check_upscaler(label: str, network: nn.Module) -> None:
    scale, channels = getattr(network, "scale", None), getattr(network, "in_chans", 3)
    if not isinstance(scale, int) or scale < 1:
        raise ConfigError(f"{shorten(label)} is not a super-resolution model: it has no integer attribute `scale`.")
    if channels != 3:
        raise ConfigError(
            f"{shorten(label)} takes {channels} channels; a model of RGB images (3 channels) is required."
        )


def _common_scale(networks: dict[str, Any], scale: int | None) -> int:
    if scale is not None and scale < 1:
        raise ConfigError(f"The scale must be a whole number of at least 1; got {scale}.")
    scales = {label: network.scale for label, network in networks.items()}
    different = sorted({own for own in (*scales.values(), scale) if own is not None})
    if len(different) > 1:
        stated = ", ".join(f"{label} {own}" for label, own in scales.items())
        asked = f" and the requested {scale}" if scale is not None else ""
        raise ConfigError(f"All models of a run must have the same scale; got {stated}{asked}.")
    if not different:
        raise ConfigError("Bicubic without a model needs a scale: give one with --scale (scale=).")
    return different[0]


def _pair(file: Path, small_file: Path | None, scale: int) -> tuple[np.ndarray, np.ndarray]:
    large = crop_to_multiple(read_rgb(file), scale)
    if small_file is None:
        return large, downscale(large, scale)
    small = read_rgb(small_file)
    if (scale * small.shape[0], scale * small.shape[1]) != large.shape[:2]:
        raise DataError(
            f"{small_file} ({small.shape[0]} x {small.shape[1]}) must be {scale} times smaller than {file} "
            f"({large.shape[0]} x {large.shape[1]})."
        )
    return large, small


@torch.inference_mode()
def _run(network: Any, small: np.ndarray) -> np.ndarray:
    """Uint8 (H, W, 3) -> uint8 (rH, rW, 3), in tiles that overlap by the network's `radius` if it states one."""
    height, width = small.shape[:2]
    radius = getattr(network, "radius", None)
    if radius is None or max(height, width) <= SIDE:
        return _pass(network, small)
    scale = network.scale
    result = np.empty((scale * height, scale * width, 3), np.uint8)
    for top in range(0, height, SIDE):
        for left in range(0, width, SIDE):
            above, before = max(top - radius, 0), max(left - radius, 0)
            window = small[above : top + SIDE + radius, before : left + SIDE + radius]
            tile = _pass(network, window)[scale * (top - above) :, scale * (left - before) :]
            target = result[scale * top : scale * (top + SIDE), scale * left : scale * (left + SIDE)]
            target[:] = tile[: target.shape[0], : target.shape[1]]
    return result


def _pass(network: Any, small: np.ndarray) -> np.ndarray:
    weight = next(network.parameters(), torch.zeros(()))
    image = torch.from_numpy(np.ascontiguousarray(small)).permute(2, 0, 1)[None].to(weight.device)
    return to_uint8(network((image / 255).to(weight.dtype))[0])
