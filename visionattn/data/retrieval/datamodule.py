"""Images with attributes, for training retrieval: `visionattn fit` with `RetrieveTask` or `ReidentifyTask`.

Batches are images (B, 3, H, W), labels int64 (B, C) with `MISSING` where a value is unknown, and the items' indices in
their split (B,), `IGNORED` for the copies that equalise the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from visionattn.data.classify.transforms import AUGMENTATIONS, Normalize, augment
from visionattn.data.module import DataModule
from visionattn.data.retrieval.attribute_batches import AttributeSampler
from visionattn.data.retrieval.catalogue import Catalogue, ImageStore, Part
from visionattn.data.retrieval.catalogue_files import LAYOUTS, read_catalogue
from visionattn.data.retrieval.embedding import eval_transform
from visionattn.data.samplers import EpochSampler, ResumableLoader, SampleKey, SeededDataset
from visionattn.errors import ConfigError

__all__ = ["EmbeddingData", "PartImages", "RetrieveData"]


class PartImages(Dataset):
    """The images of a split, with their indices in it."""

    def __init__(self, store: ImageStore, part: Part) -> None:
        self.store = store
        self.part = part

    def __len__(self) -> int:
        return len(self.part.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.store.open(self.part.images[index]), index


class _LabelledImages(SeededDataset):
    """`SeededDataset` that adds each item's labels."""

    def __getitem__(self, key: SampleKey | int) -> tuple[Tensor, Tensor, int]:
        image, place = super().__getitem__(key)
        sample = key.sample if isinstance(key, SampleKey) else key
        return image, self.dataset.part.labels[sample], place


class EmbeddingData(DataModule):
    """Images for a task that computes embeddings; their transforms follow from the model.

    The hyper-parameters are image_size, augmentation, batch_size, num_workers, seed and, for some datasets, erasing,
    as documented in `RetrieveData`.
    """

    def check_augmentation(self) -> None:
        """Refuse an unknown augmentation before the model is created.

        Raises:
            ConfigError: It is neither a known name nor the path of a pipeline.
        """
        augmentation = self.hparams.augmentation
        if augmentation not in AUGMENTATIONS and not augmentation.endswith((".json", ".yaml", ".yml")):
            raise ConfigError(
                f"data.augmentation must be one of {', '.join(map(repr, AUGMENTATIONS))}, or the path "
                f"of a pipeline saved by albumentations (.json, .yaml); got {augmentation!r}."
            )

    def setup(self, stage: str) -> None:
        """Take from the model what was not given."""
        task: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        config = dict(task.input_config)
        if self.hparams.image_size is not None:
            config["size"] = list(self.hparams.image_size)
        if len(config["size"]) != 2:
            raise ConfigError(f"data.image_size must be height and width; got {config['size']}.")
        self.image_shape = (3, *config["size"])
        # Stored in the checkpoint as its input configuration.
        self.image_config = {
            "input_size": self.image_shape,
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": "center" if config["size"][0] == config["size"][1] else "squash",
        }
        self._eval_transform = eval_transform(config)
        interpolation = v2.InterpolationMode(config["interpolation"])
        self._train_transform = v2.Compose(
            [
                partial(Image.Image.convert, mode="RGB"),
                *augment(self.hparams.augmentation, tuple(config["size"]), interpolation),
                Normalize(config["mean"], config["std"]),
                v2.RandomErasing(self.hparams.get("erasing", 0.0)),
            ]
        )

    def _in_order(self, dataset: SeededDataset) -> DataLoader:
        """Each image once."""
        sampler = EpochSampler(dataset, *self._ranks, training=False, seed=self.hparams.seed)
        return self._loader(dataset, sampler, self.hparams.batch_size)

    def _loader(
        self,
        dataset: Dataset,
        sampler: EpochSampler,
        batch_size: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> DataLoader:
        return ResumableLoader(
            self.watch(dataset),
            sampler=sampler,
            batch_size=batch_size,
            num_workers=self.hparams.num_workers,
            collate_fn=collate,
            persistent_workers=self.hparams.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.hparams.seed),
        )

    @property
    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


class RetrieveData(EmbeddingData):
    """Training, validation and test items for retrieval.

    Sizes and normalisation that are not given follow from the model.

    Args:
        root: CSV file of a table, or folder of a dataset (see `visionattn.data.retrieval.catalogue_files`).
        layout: table, asen, market1501 or cub.
        images: Folder or zip file of the images; None uses the default of the layout.
        attributes: Attributes to use, in this order; None uses all.
        min_count: Values with fewer training items count as unknown.
        values_per_batch: P, values of each attribute per batch and device.
        images_per_value: K, images of each value; a batch has C P K images.
        batch_size: Images per batch and device in validation and test.
        image_size: Height and width of the model's input images.
        augmentation: `"none"`, `"shift"`, `"crop-flip"`, `"imagenet"`, or the path of a pipeline saved by
            `albumentations.save`; colour changes hide a colour attribute.
        erasing: Probability that a random rectangle of a training image is erased (re-identification).
        num_workers: Loading processes per device; the results do not depend on it.
        seed: Seed of draws and augmentation.

    Raises:
        ConfigError: The layout, an attribute or the augmentation is unknown, or a batch has fewer than two values.
        DataError: Files are missing or damaged.
    """

    def __init__(
        self,
        root: str,
        layout: str = "table",
        images: str | None = None,
        attributes: list[str] | None = None,
        min_count: int = 0,
        values_per_batch: int = 8,
        images_per_value: int = 4,
        batch_size: int = 64,
        image_size: list[int] | None = None,
        augmentation: str = "crop-flip",
        erasing: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # The logger rejects names that the hyper-parameters of model and data share.
        self.save_hyperparameters(logger=False)
        if layout not in LAYOUTS:
            raise ConfigError(f"data.layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}.")
        self.check_augmentation()
        self.check_counts()
        if values_per_batch < 2 or images_per_value < 2:
            raise ConfigError(
                "data.values_per_batch and data.images_per_value must be at least 2: losses compare images."
            )
        self._parts: dict[str, Part] = {}

    @cached_property
    def catalogue(self) -> Catalogue:
        """All items."""
        given = self.hparams
        return read_catalogue(given.layout, given.root, given.images, given.attributes, given.min_count)

    @property
    def attribute_values(self) -> dict[str, list[str]]:
        """Attribute -> its values in the training split, known before the model is created."""
        return self.catalogue.values

    def part(self, name: str) -> Part:
        """The items of a split, `"train"`, `"val"` or `"test"`."""
        if name not in self._parts:
            self._parts[name] = self.catalogue.part(name)
        return self._parts[name]

    def describe(self, split: str) -> str:
        """Number of images of a split, and of values of each attribute."""
        part = self.part(split)
        words = f"{len(part.images):,} images"
        if split == "train":
            counts = [f"{name} {len(values):,}" for name, values in self.attribute_values.items()]
            return f"{words}; values of each attribute: {', '.join(counts[:10])}{', ...' if counts[10:] else ''}"
        return f"{words}, {int(part.is_query.sum()):,} queries, {int(part.is_gallery.sum()):,} in the gallery"

    def train_dataloader(self) -> DataLoader:
        """P values of each attribute and K images of each, augmented."""
        given, part = self.hparams, self.part("train")
        images = PartImages(self.catalogue.images, part)
        dataset = _LabelledImages(images, self._train_transform, given.seed, training=True)
        sampler = AttributeSampler(
            part.labels, given.values_per_batch, given.images_per_value, *self._ranks, given.seed
        )
        return self._loader(dataset, sampler, sampler.batch_size)

    def val_dataloader(self) -> DataLoader:
        """The validation split in order, each item once."""
        return self._ordered("val")

    def test_dataloader(self) -> DataLoader:
        """The test split in order, each item once."""
        return self._ordered("test")

    def _ordered(self, name: str) -> DataLoader:
        images = PartImages(self.catalogue.images, self.part(name))
        return self._in_order(_LabelledImages(images, self._eval_transform, None))
