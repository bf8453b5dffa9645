"""Training, validation and test pairs for stereo matching and optical flow: generated, or from data sets' folders."""

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
    """A scene's views and truth as a field; of the right view where the data set knows it.

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
    """Draws a window of a pair at a random scale, mirrored in half of the cases, its views' colours changed apart.

    Args:
        size: Height and width of the window.
        scaling: Largest factor by which pairs are enlarged or shrunk; those smaller than the window are enlarged to it.
        colours: Standard deviation of the logarithms of each view's brightness and of its channels.
        exchange: Exchange the views of mirrored pairs, as stereo asks.
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
        # Sides differ a little in scale, as the width of real lenses' images does.
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
    """Pairs read from files, as often as `length` asks, changed by a transform that seed, epoch and index draw.

    Args:
        scenes: The files.
        length: Pairs an epoch; None is each once.
        transform: Changes a pair; None leaves it.
        seed: Of the transform.
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
    """Pairs as tensors with their number, `IGNORED` for the copies that even out ranks."""

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

    Batches are views uint8 (B, 2, 3, H, W), the left or first one first; fields (B, 2, H, W, 2) of float32, NaN where
    the truth is not known (see `visionattn.data.matching.pairs`); what the other view sees (B, 2, H, W) of bool; and
    numbers (B,), `IGNORED` for the copies that even out ranks. Training pairs have the crop's size; pairs from folders
    are drawn as windows at random scales, mirrored, with colours of their own. Validation and test show folders' pairs
    whole, one a batch, and the same generated ones each time.

    Args:
        train: Folders of data sets, laid out as `visionattn.data.matching.stereo` and
            `visionattn.data.matching.flow_sets` say; None generates scenes (`visionattn.data.matching.scenes`).
        val: Likewise for validation.
        test: Likewise for the test; None tests on the validation pairs.
        layout: That of the folders; None finds out.
        factor: By which the numbers of PNGs of disparities are larger than pixels, one for all scenes or by their names
            (see `visionattn.data.matching.stereo.find_scenes`).
        flow: Optical flow instead of stereo; None takes the model's task.
        crop_size: Height and width of training pairs and generated ones, multiples of 32 from 192 on.
        epoch_pairs: Pairs that one epoch draws.
        val_pairs: Generated pairs of the validation and of the test.
        max_disparity: Of generated pairs, the largest disparity or motion in pixels.
        photographs: Folders of pictures that generated surfaces show, beside procedural textures.
        rectification: Of generated stereo pairs, the largest vertical error in pixels; validation has none.
        scaling: Of folders' pairs, the largest factor of size.
        colours: Of folders' pairs, how much each view's colours change (standard deviation of logarithms).
        batch_size: Pairs a batch and device.
        num_workers: Loading processes a device; the results do not depend on it.
        seed: Of order, scenes and windows.
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
        scaling: float = 1.4,
        colours: float = 0.1,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # The logger would refuse the names that the model's parameters share.
        self.save_hyperparameters(logger=False)
        if min(crop_size) < LEAST or any(side % MULTIPLE for side in crop_size):
            raise ConfigError(
                f"data.crop_size has multiples of {MULTIPLE} from {LEAST} on, but got {crop_size[0]} x {crop_size[1]}."
            )
        if scaling < 1 or colours < 0 or rectification < 0:
            raise ConfigError("data.scaling is 1 or more, data.colours and data.rectification are 0 or more.")
        self.check_counts(epoch_pairs=1, val_pairs=1)
        if epoch_pairs < batch_size:
            raise ConfigError(f"data.epoch_pairs is {epoch_pairs}, less than one batch of {batch_size}.")
        self._pairs: dict[str, Dataset[MatchPair]] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Size of the views that the model is trained on."""
        return 3, *self.hparams.crop_size

    @property
    def flow(self) -> bool:
        """Optical flow instead of stereo.

        Raises:
            ConfigError: The model does the other.
        """
        given = self.hparams.flow
        model = getattr(getattr(self.trainer, "lightning_module", None), "flow", None)
        if None not in (given, model) and given != model:
            raise ConfigError(f"The model is for {'flow' if model else 'stereo'}, but data.flow is {given}.")
        return bool(given if model is None else model)

    def setup(self, stage: str) -> None:
        """Find the pairs of the parts that the stage needs."""
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
            # Validation and test are of other scenes than training, and not of the same.
            seed=3 * given.seed + ("train", "val", "test").index(part),
        )

    def _find(self, folders: list[str] | str) -> Sequence[Any]:
        """The scenes; what is assumed of their factors is told."""
        given = self.hparams
        if self.flow:
            if given.factor is not None:
                raise ConfigError("data.factor is of disparities; files of flow state their unit: leave it out.")
            return find_flow_scenes(folders, given.layout)
        scenes = with_factors(find_scenes(folders, given.layout), given.factor)  # names may be of another split's
        for note in summarize((scene.name, note) for scene in scenes for note in scene.assumed()):
            require("lightning.pytorch.utilities", "train").rank_zero_warn(note)
        return scenes

    @property
    def tests_on_validation(self) -> bool:
        """Whether there are folders for validation and none for the test."""
        return bool(self.hparams.val) and not self.hparams.test

    def describe(self, split: str) -> str:
        """Pairs of a split, and where they come from."""
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
