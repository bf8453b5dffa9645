"""Training, validation and test pairs for stereo matching and optical flow: generated, or from dataset folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from visionattn.data.matching.flow_sets import FlowScene, find_flow_scenes
from visionattn.data.matching.pairs import MatchPair, crop, flip, resize, seen_by_order
from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.data.matching.stereo import Scene, find_scenes, summarize, with_factors
from visionattn.data.module import DataModule
from visionattn.data.samplers import IGNORED, EpochSampler, ResumableLoader, SampleKey
from visionattn.data.skipping import SkippingDataset
from visionattn.errors import ConfigError, require

__all__ = ["MatchData", "RandomWindows", "read_stereo"]

LEAST, MULTIPLE = 192, 32


def read_stereo(scene: Scene) -> MatchPair:
    """A scene's views and its ground truth as a field; that of the right view if the dataset has it.

    Raises:
        DataError: A file is damaged.
    """
    pair = scene.read()
    zero = np.zeros_like(pair.truth)
    left = np.stack([-pair.truth, zero], -1)
    right = np.full_like(left, np.nan) if pair.right_truth is None else np.stack([pair.right_truth, zero], -1)
    left_seen = seen_by_order(left) if pair.nonocc is None else pair.nonocc & np.isfinite(pair.truth)
    fields = np.stack([left, right])
    return MatchPair(np.stack([pair.left, pair.right]), fields, np.stack([left_seen, seen_by_order(right)]))


class RandomWindows:
    """Draws a window of a pair at a random scale, mirrored with probability 1/2, and changes the colours of each view.

    Args:
        size: Height and width of the window.
        scaling: Largest factor of enlarging or shrinking; pairs smaller than the window are enlarged to it.
        colours: Standard deviation of the logarithms of each view's brightness and of its channels.
        exchange: Exchange the views of mirrored pairs, as stereo requires.
    """

    def __init__(self, size: tuple[int, int], scaling: float, colours: float, exchange: bool) -> None:
        self.size = size
        self.scaling = scaling
        self.colours = colours
        self.exchange = exchange

    def __call__(self, pair: MatchPair, rng: np.random.Generator) -> MatchPair:
        """Draw."""
        height, width = self.size
        old = pair.seen.shape[1:]
        factor = self.scaling ** rng.uniform(-1, 1)
        # Height and width differ a little in scale, like images of real lenses.
        rows, columns = (
            max(least, round(side * factor * self.scaling ** rng.uniform(-0.2, 0.2)))
            for side, least in zip(old, self.size)
        )
        if (rows, columns) != old:
            pair = resize(pair, rows, columns)
        pair = crop(pair, int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width)
        if rng.random() < 0.5:
            pair = flip(pair, self.exchange)
        gains = np.exp(self.colours * (rng.standard_normal((2, 1, 1, 1)) + 0.5 * rng.standard_normal((2, 1, 1, 3))))
        views = np.clip(np.rint(pair.views * gains), 0, 255).astype(np.uint8)
        return pair._replace(views=views)


class FolderPairs(Dataset):
    """Pairs read from files, `length` per epoch, with a transform seeded by seed, epoch and index.

    Args:
        scenes: The files.
        length: Pairs per epoch; None uses each pair once.
        transform: Changes a pair; None leaves it unchanged.
        seed: Seed of the transform.
    """

    def __init__(
        self, scenes: Sequence[Scene | FlowScene], length: int | None, transform: RandomWindows | None, seed: int
    ) -> None:
        self.scenes = scenes
        self.length = len(scenes) if length is None else length
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey | int) -> MatchPair:
        sample, epoch, _ = key if isinstance(key, SampleKey) else SampleKey(key, epoch=0)
        scene = self.scenes[sample % len(self.scenes)]
        pair = scene.read() if isinstance(scene, FlowScene) else read_stereo(scene)
        if self.transform is None:
            return pair
        return self.transform(pair, np.random.default_rng((self.seed, epoch, sample)))


class PairTensors(SkippingDataset):
    """Pairs as tensors with their index, `IGNORED` for the copies that equalise the ranks."""

    def __init__(self, pairs: Dataset[MatchPair], training: bool = False) -> None:
        self.pairs = pairs
        self.training = training
        self.files = len(pairs.scenes) if isinstance(pairs, FolderPairs) else None

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        views, fields, seen = (torch.from_numpy(np.ascontiguousarray(array)) for array in self.pairs[key])
        sample, _, is_copy = key if isinstance(key, SampleKey) else SampleKey(key, epoch=0)
        return views.permute(0, 3, 1, 2).contiguous(), fields, seen, IGNORED if is_copy else sample


class MatchData(DataModule):
    """Training, validation and test pairs for stereo matching and optical flow.

    Batches are views uint8 (B, 2, 3, H, W), the left or first one first; fields float32 (B, 2, H, W, 2), NaN where the
    ground truth is unknown (see `visionattn.data.matching.pairs`); bool (B, 2, H, W), whether the other view sees the
    pixel; and indices (B,), `IGNORED` for the copies that equalise the ranks. Training pairs have the size of the crop;
    those from folders are drawn as windows at random scales, mirrored, with changed colours. Validation and test use
    folders' pairs whole, one per batch, and the same generated pairs each time.

    Args:
        train: Dataset folders, laid out as described in `visionattn.data.matching.stereo` and
            `visionattn.data.matching.flow_sets`; None generates scenes (`visionattn.data.matching.scenes`).
        val: Likewise for validation.
        test: Likewise for testing; None tests on the validation pairs.
        layout: Layout of the folders; None detects it.
        factor: Scale factor of disparities in PNG files, one for all scenes or by scene name
            (see `visionattn.data.matching.stereo.find_scenes`).
        flow: Optical flow instead of stereo; None takes the model's task.
        crop_size: Height and width of training and generated pairs, multiples of 32, at least 192.
        epoch_pairs: Pairs per epoch.
        val_pairs: Generated pairs for validation and for testing.
        max_disparity: Largest disparity or motion of generated pairs, in pixels.
        photographs: Folders of images to texture generated surfaces with, next to procedural textures.
        rectification: Largest vertical error of generated stereo pairs, in pixels; validation has none.
        thin: Probability of an object of generated pairs to be a thin structure: a wire, a fence, a grid or foliage.
        scaling: Largest scale factor of pairs from folders.
        colours: Colour change of each view of pairs from folders (standard deviation of logarithms).
        batch_size: Pairs per batch and device.
        num_workers: Loading processes per device; the results do not depend on it.
        seed: Seed of order, scenes and windows.
    """

    def __init__(
        self,
        train: list[str] | str | None = None,
        val: list[str] | str | None = None,
        test: list[str] | str | None = None,
        layout: str | None = None,
        factor: float | dict[str, float] | None = None,
        flow: bool | None = None,
        crop_size: tuple[int, int] = (192, 384),
        epoch_pairs: int = 4000,
        val_pairs: int = 64,
        max_disparity: float = 96.0,
        photographs: list[str] | str | None = None,
        rectification: float = 0.6,
        thin: float = 0.0,
        scaling: float = 1.4,
        colours: float = 0.1,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # The logger rejects names that the hyper-parameters of model and data share.
        self.save_hyperparameters(logger=False)
        if min(crop_size) < LEAST or any(side % MULTIPLE for side in crop_size):
            raise ConfigError(
                f"data.crop_size must be multiples of {MULTIPLE} from {LEAST} on; got {crop_size[0]} x {crop_size[1]}."
            )
        if scaling < 1 or colours < 0 or rectification < 0:
            raise ConfigError("data.scaling must be at least 1, data.colours and data.rectification at least 0.")
        self.check_counts(epoch_pairs=1, val_pairs=1)
        if epoch_pairs < batch_size:
            raise ConfigError(f"data.epoch_pairs must be at least data.batch_size ({batch_size}); got {epoch_pairs}.")
        self._pairs: dict[str, Dataset[MatchPair]] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Size of the views during training."""
        return 3, *self.hparams.crop_size

    @property
    def flow(self) -> bool:
        """Optical flow instead of stereo.

        Raises:
            ConfigError: The model is for the other task.
        """
        given = self.hparams.flow
        model = getattr(getattr(self.trainer, "lightning_module", None), "flow", None)
        if None not in (given, model) and given != model:
            raise ConfigError(f"The model is for {'flow' if model else 'stereo'}, but data.flow is {given}.")
        return bool(given if model is None else model)

    def setup(self, stage: str) -> None:
        """Find the pairs of the splits that the stage needs."""
        for part in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if part not in self._pairs:
                self._pairs[part] = self._open(part)

    def _open(self, part: str) -> Dataset[MatchPair]:
        given, training = self.hparams, part == "train"
        folders = given[part] or (given.val if part == "test" else None)
        if folders:
            scenes: Sequence[Any] = self._find(folders)
            windows = RandomWindows(given.crop_size, given.scaling, given.colours, exchange=not self.flow)
            return FolderPairs(
                scenes, given.epoch_pairs if training else None, windows if training else None, given.seed
            )
        photographs = [given.photographs] if isinstance(given.photographs, str) else given.photographs or []
        return GeneratedPairs(
            given.epoch_pairs if training else given.val_pairs,
            given.crop_size,
            given.max_disparity,
            photographs,
            self.flow,
            given.rectification if training else 0.0,
            # Validation and test use other scenes than training, and than each other.
            seed=3 * given.seed + ("train", "val", "test").index(part),
            thin=given.thin if training else 0.0,
        )

    def _find(self, folders: list[str] | str) -> Sequence[Any]:
        """The scenes; logs what is assumed about their factors."""
        given = self.hparams
        if self.flow:
            if given.factor is not None:
                raise ConfigError("data.factor applies to disparities only; flow files have a fixed unit: remove it.")
            return find_flow_scenes(folders, given.layout)
        scenes = with_factors(find_scenes(folders, given.layout), given.factor)  # names can belong to another split
        for note in summarize((scene.name, note) for scene in scenes for note in scene.assumed()):
            require("lightning.pytorch.utilities", "train").rank_zero_warn(note)
        return scenes

    @property
    def tests_on_validation(self) -> bool:
        """Whether there are validation folders but no test folders."""
        return bool(self.hparams.val) and not self.hparams.test

    def describe(self, split: str) -> str:
        """Number and origin of the pairs of a split."""
        if split not in self._pairs:
            self._pairs[split] = self._open(split)
        pairs = self._pairs[split]
        if isinstance(pairs, FolderPairs):
            return f"{len(pairs):,} pairs from {len(pairs.scenes):,} scenes in folders"
        return f"{len(pairs):,} generated pairs"  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader:
        """Random scenes or windows."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Whole validation pairs."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Whole test pairs."""
        return self._loader("test")

    def _loader(self, part: str) -> DataLoader:
        given, training, pairs = self.hparams, part == "train", self._pairs[part]
        num_workers = given.num_workers if training else 0
        ranks = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return ResumableLoader(
            self.watch(PairTensors(pairs, training)),
            sampler=EpochSampler(pairs, *ranks, training, given.seed),
            batch_size=given.batch_size if training or isinstance(pairs, GeneratedPairs) else 1,
            drop_last=training,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(given.seed),
        )
