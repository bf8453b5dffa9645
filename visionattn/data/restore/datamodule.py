"""Low- and high-resolution image pairs for super-resolution: downscaled by MATLAB's bicubic, or given as files.

A low-resolution patch at (y, x) corresponds to the high-resolution patch at (r y, r x). The whole high-resolution image
is downscaled, so that patches at the border equal those that a model sees at test time.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from visionattn.data.images import FORMATS, check_unreadable, find_images, list_images, pair_by_name, read_rgb
from visionattn.data.module import DataModule
from visionattn.data.restore.bicubic import crop_to_multiple, downscale
from visionattn.data.restore.degradation import Degradation, compress
from visionattn.data.samplers import EpochSampler, ResumableLoader, SampleKey, SeededDataset
from visionattn.errors import ConfigError, DataError, InputError, shorten

__all__ = ["RestoreData"]

# Low-resolution pixels around a patch that bicubic downscaling by any factor depends on.
_MARGIN = 2


class Pair(NamedTuple):
    """A high-resolution image uint8 (rH, rW, 3) and its low-resolution one (H, W, 3), None if not yet computed."""

    small: np.ndarray | None
    large: np.ndarray


class PairFiles(Dataset):
    """Pairs read from files.

    Args:
        large: High-resolution image files.
        small: Their low-resolution files; None if there are none.
        scale: Factor r between both.
        shrink: Compute missing low-resolution images by bicubic downscaling.
        keep: Read all files now and keep the pairs in memory, instead of reading them each time.

    Raises:
        DataError: Too many images are unreadable, or the requested one is.
        InputError: The size of a low-resolution image is not that of its high-resolution one divided by r.
    """

    def __init__(self, large: list[Path], small: list[Path] | None, scale: int, shrink: bool, keep: bool) -> None:
        self.large = large
        self.small = small
        self.scale = scale
        self.shrink = shrink
        self._kept: list[Pair | DataError] | None = None
        if keep:
            self._kept = [self._try(index) for index in range(len(large))]
            check_unreadable([str(kept) for kept in self._kept if isinstance(kept, DataError)], len(large))

    def __len__(self) -> int:
        return len(self.large)

    def __getitem__(self, index: int) -> tuple[Pair, int]:
        pair = self._read(index) if self._kept is None else self._kept[index]
        if isinstance(pair, DataError):
            raise pair
        return pair, index

    def _try(self, index: int) -> Pair | DataError:
        try:
            return self._read(index)
        except DataError as error:
            return error

    def _read(self, index: int) -> Pair:
        large = crop_to_multiple(read_rgb(self.large[index]), self.scale)
        if self.small is None:
            return Pair(downscale(large, self.scale) if self.shrink else None, large)
        small = read_rgb(self.small[index])
        if (large.shape[0], large.shape[1]) != (self.scale * small.shape[0], self.scale * small.shape[1]):
            raise InputError(
                f"{self.small[index]} must be {self.large[index]} downscaled {self.scale} times; got "
                f"{small.shape[0]} x {small.shape[1]} for {large.shape[0]} x {large.shape[1]}."
            )
        return Pair(small, large)


class CropsByArea(Dataset):
    """Each pair in proportion to its number of pixels, `length` crops in all.

    Args:
        pairs: The pairs.
        areas: Size of each pair.
        length: Crops per epoch.
    """

    def __init__(self, pairs: PairFiles, areas: list[int], length: int) -> None:
        self.pairs = pairs
        ends = np.cumsum(areas)
        # Indices of the pairs at the middles of `length` equal segments of the total area.
        self._which = np.searchsorted(ends, (np.arange(length) + 0.5) * (ends[-1] / length), side="right")

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> tuple[Pair, int]:
        return self.pairs[int(self._which[index])]


class RandomPatches:
    """Draws an aligned pair of patches from an image pair, in one of eight orientations.

    Args:
        size: Side of the low-resolution patch.
        scale: Factor r.
        degradation: Applied to the low-resolution patch, which is then computed from the high-resolution surroundings.
    """

    def __init__(self, size: int, scale: int, degradation: Degradation) -> None:
        self.size = size
        self.scale = scale
        self.degradation = degradation

    def __call__(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair -> uint8 (3, size, size) and (3, r size, r size)."""
        r, size = self.scale, self.size
        top = random.randrange(pair.large.shape[0] // r - size + 1)
        left = random.randrange(pair.large.shape[1] // r - size + 1)
        turns, mirrored = divmod(random.randrange(8), 2)
        large = pair.large[r * top : r * (top + size), r * left : r * (left + size)]
        if pair.small is None or self.degradation:
            small = self._shrink(pair.large, top, left)
        else:
            small = pair.small[top : top + size, left : left + size]
        return tuple(  # type: ignore[return-value]
            _to_tensor(np.rot90(patch[:, ::-1] if mirrored else patch, turns)) for patch in (small, large)
        )

    def _shrink(self, picture: np.ndarray, top: int, left: int) -> np.ndarray:
        """The low-resolution patch, computed from no more of the high-resolution image than it depends on."""
        r, size = self.scale, self.size
        margin = _MARGIN + math.ceil(3 * self.degradation.blur / r)
        above, before = max(top - margin, 0), max(left - margin, 0)
        window = picture[r * above : r * (top + size + margin), r * before : r * (left + size + margin)]
        if not self.degradation:
            small = downscale(window, r)
            return small[top - above : top - above + size, left - before : left - before + size]
        small = downscale(self.degradation.before(window), r)
        return self.degradation.after(small[top - above : top - above + size, left - before : left - before + size])


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """Uint8 (H, W, 3) -> (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _whole(pair: Pair, jpeg: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair as tensors uint8 (3, H, W) and (3, rH, rW), the low-resolution one after JPEG of a quality."""
    if jpeg is not None and pair.small is not None:
        pair = pair._replace(small=compress(pair.small, jpeg))
    return tuple(_to_tensor(picture) for picture in pair if picture is not None)  # type: ignore[return-value]


class SeededPairs(SeededDataset):
    """`SeededDataset` of pairs: low resolution, high resolution and the pair's index (`IGNORED` for copies)."""

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, torch.Tensor, int]:
        (small, large), number = super().__getitem__(key)
        return small, large, number


class RestoreData(DataModule):
    """Training, validation and test images for super-resolution.

    Batches are low-resolution images uint8 (B, 3, H, W), high-resolution ones uint8 (B, 3, rH, rW), and indices (B,),
    `IGNORED` for the copies that equalise the ranks. Training draws aligned patches in eight orientations, in
    proportion to image size; validation and test use whole images, one per batch.

    Args:
        train: Folders of high-resolution training images (png, jpg, webp, bmp, tiff).
        val: Folder of high-resolution validation images.
        test: Folder of high-resolution test images; None tests on the validation images.
        train_small: For each training folder, one of low-resolution images with the same names (or DIV2K's:
            `birdx4.png`); None computes them by bicubic downscaling.
        val_small: Folder of the low-resolution validation images; None computes them by bicubic downscaling.
        test_small: Folder of the low-resolution test images; None computes them by bicubic downscaling.
        scale: Factor r; None takes the model's.
        patch_size: Side of the low-resolution patches. Smaller images are left out.
        epoch_crops: Patches per epoch.
        batch_size: Patches per batch and device.
        num_workers: Loading processes per device; the results do not depend on it.
        memory_gb: The decoded images of a split are kept in memory if they need at most this.
        blur: Largest standard deviation of a blur before downscaling, in pixels of the high-resolution image.
        noise: Largest standard deviation of noise in the low-resolution image, in levels of 0..255.
        jpeg: Lowest JPEG quality of the low-resolution image, below 95, with any chroma subsampling; None for no JPEG.
        val_jpeg: JPEG quality of the low-resolution validation and test images, with 4:2:0 chroma subsampling; None for
            no JPEG.
        seed: Seed of order, patches and degradations.
    """

    def __init__(
        self,
        train: list[str] | str | None = None,
        val: str | None = None,
        test: str | None = None,
        train_small: list[str] | str | None = None,
        val_small: str | None = None,
        test_small: str | None = None,
        scale: int | None = None,
        patch_size: int = 32,
        epoch_crops: int = 16000,
        batch_size: int = 16,
        num_workers: int = 0,
        memory_gb: float = 4.0,
        blur: float = 0.0,
        noise: float = 0.0,
        jpeg: int | None = None,
        val_jpeg: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # The logger rejects names that the hyper-parameters of model and data share.
        self.save_hyperparameters(logger=False)
        folders = {"train": _as_list(train), "val": _as_list(val), "test": _as_list(test or val)}
        small = {
            "train": _as_list(train_small),
            "val": _as_list(val_small),
            "test": _as_list(test_small if test else val_small),
        }
        for part, given in small.items():
            if given and len(given) != len(folders[part]):
                raise ConfigError(
                    f"data.{part}_small must have one folder for each in data.{part} ({len(folders[part])}), in the "
                    f"same order; got {len(given)}."
                )
        self.check_counts(patch_size=1, epoch_crops=1, scale=1)
        if min(blur, noise) < 0 or (jpeg is not None and not 1 <= jpeg < 95):
            raise ConfigError("data.blur and data.noise must be at least 0, and data.jpeg a quality from 1 to 94.")
        if val_jpeg is not None and not 1 <= val_jpeg <= 100:
            raise ConfigError(f"data.val_jpeg must be a quality from 1 to 100; got {val_jpeg}.")
        self._degradation = Degradation(blur, noise, jpeg)
        if self._degradation and train_small:
            raise ConfigError(
                "Given low-resolution images are not degraded: remove data.train_small, or blur, noise and jpeg."
            )
        self._folders, self._small = folders, small
        self._broken: list[str] = []
        self._pairs: dict[str, PairFiles] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Size of the model's input patches."""
        return 3, self.hparams.patch_size, self.hparams.patch_size

    @cached_property
    def scale(self) -> int:
        """Factor r, given or the model's.

        Raises:
            ConfigError: Neither is given, or both differ.
        """
        given = self.hparams.scale
        model = getattr(getattr(self.trainer, "lightning_module", None), "scale", None)
        if None not in (given, model) and given != model:
            raise ConfigError(f"The model upscales {model} times, but data.scale is {given}.")
        scale = given if model is None else model
        if scale is None:
            raise ConfigError("Without a model, data.scale must be given.")
        return scale

    def setup(self, stage: str) -> None:
        """Open the image pairs of the splits that the stage needs."""
        for part in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if part not in self._pairs:
                self._pairs[part] = self._open(part)

    def train_dataloader(self) -> DataLoader:
        """Random patches."""
        given = self.hparams
        crops = CropsByArea(self._pairs["train"], self._areas, given.epoch_crops)
        if given.epoch_crops < given.batch_size * self._ranks[0]:
            raise ConfigError(
                f"data.epoch_crops must be at least data.batch_size ({given.batch_size}); got {given.epoch_crops}."
            )
        patches = RandomPatches(given.patch_size, self.scale, self._degradation)
        dataset = SeededPairs(crops, patches, given.seed, training=True)
        dataset.files = len(self._pairs["train"])
        return self._loader(dataset, given.batch_size, training=True)

    def val_dataloader(self) -> DataLoader:
        """Whole validation images, one per batch."""
        return self._loader(SeededPairs(self._pairs["val"], self._whole, None), 1, training=False)

    def test_dataloader(self) -> DataLoader:
        """Whole test images, one per batch."""
        return self._loader(SeededPairs(self._pairs["test"], self._whole, None), 1, training=False)

    @property
    def _whole(self) -> Callable[[Pair], tuple[torch.Tensor, torch.Tensor]]:
        return partial(_whole, jpeg=self.hparams.val_jpeg)

    def _loader(self, dataset: SeededPairs, batch_size: int, training: bool) -> DataLoader:
        num_workers = self.hparams.num_workers if training else 0
        return ResumableLoader(
            self.watch(dataset),
            sampler=EpochSampler(dataset, *self._ranks, training, self.hparams.seed),
            batch_size=batch_size,
            drop_last=training,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.hparams.seed),
        )

    @property
    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _open(self, part: str) -> PairFiles:
        """The pairs of a split, read now if they fit into memory."""
        if not self._folders[part]:
            raise ConfigError(f"There are no images: set data.{part if part == 'train' else 'val'} to a folder.")
        found = {folder: find_images(folder) for folder in self._folders[part]}
        large = [path for files in found.values() for path in files]
        small = None
        if self._small[part]:
            pairs = zip(found.values(), self._small[part])
            small = [path for files, folder in pairs for path in pair_by_name(files, folder, self.scale)]
        by_file = self._sizes(large)
        readable = [path in by_file for path in large]
        small = small and list(itertools.compress(small, readable))
        large = list(itertools.compress(large, readable))
        sizes = [by_file[path] for path in large]
        if part == "train":
            kept = [min(size) // self.scale >= self.hparams.patch_size for size in sizes]
            self._warn(large, kept)
            large, sizes = list(itertools.compress(large, kept)), list(itertools.compress(sizes, kept))
            small = small and list(itertools.compress(small, kept))
            self._areas = [height * width for height, width in sizes]
        pixels = sum(height * width for height, width in sizes)
        keep = 3 * pixels * (1 + 1 / self.scale**2) <= self.hparams.memory_gb * 1e9
        return PairFiles(large, small, self.scale, shrink=keep or part != "train", keep=keep)

    def _sizes(self, files: list[Path]) -> dict[Path, tuple[int, int]]:
        """Height and width of each file that can be opened."""
        sizes, broken = {}, []
        for path in files:
            try:
                sizes[path] = _size(path)
            except DataError as error:
                broken.append(str(error))
        check_unreadable(broken, len(files))
        self._broken += broken
        return sizes

    def skipped(self) -> list[str]:
        """The reason for each image that could not be read so far."""
        return list(dict.fromkeys([*self._broken, *super().skipped()]))

    @property
    def tests_on_validation(self) -> bool:
        """Whether there is no test folder."""
        return not self.hparams.test

    def describe(self, split: str) -> str:
        """Number of images of a split."""
        if split not in self._pairs:
            self._pairs[split] = self._open(split)
        words = f"{len(self._pairs[split]):,} pictures"
        return f"{words}, {self.hparams.epoch_crops:,} patches per epoch" if split == "train" else words

    def left_out(self) -> list[str]:
        """Files in the folders of the opened splits that are not images."""
        folders = dict.fromkeys(folder for split in self._pairs for folder in self._folders[split])
        described = {folder: list_images(folder).describe_left_out() for folder in folders}
        return [f"{shorten(folder)}: {words}" for folder, words in described.items() if words]

    def _warn(self, large: list[Path], kept: list[bool]) -> None:
        small = [path.name for path, is_kept in zip(large, kept) if not is_kept]
        side = self.scale * self.hparams.patch_size
        if len(small) == len(large):
            raise DataError(f"No training image has at least {side} pixels per side: reduce data.patch_size.")
        if small:
            names = ", ".join(small[:3]) + (" ..." if len(small) > 3 else "")
            warnings.warn(
                f"{len(small)} of {len(large)} training images have less than {side} pixels per side and are left out: "
                f"{names}",
                stacklevel=2,
            )


def _as_list(value: list[str] | str | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _size(path: Path) -> tuple[int, int]:
    """Height and width, without decoding."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except Exception as error:
        # PIL raises almost any exception for damaged files: OSError, SyntaxError, struct.error, ValueError.
        raise DataError(f"Could not read the image {shorten(path)}: {shorten(error)}.") from error
