"""Albumentations: seeded per sample, refused where it is another package."""

from __future__ import annotations

import importlib.metadata
import os

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("albumentations")

import albumentations

from visionattn.data.classify.albumentations_adapter import AlbumentationsTransform
from visionattn.data.samplers import EpochSampler, ResumableLoader, SeededDataset
from visionattn.errors import ConfigError, MissingPackageError


@pytest.fixture(params=["json", "yaml"])
def pipeline(request, tmp_path):
    path = tmp_path / f"pipeline.{request.param}"
    transforms = [albumentations.RandomCrop(12, 12), albumentations.HorizontalFlip(), albumentations.GaussNoise(p=1)]
    albumentations.save(albumentations.Compose(transforms), path, data_format=request.param)
    return path


class Pictures(torch.utils.data.Dataset):
    """The same picture again and again."""

    picture = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.picture, index


class ToArray:
    """A transform that ends in a tensor."""

    def __init__(self, path):
        self.transform = AlbumentationsTransform(path)

    def __call__(self, image):
        return torch.from_numpy(np.asarray(self.transform(image)).copy())


def batches(path, num_workers, epoch):
    dataset = SeededDataset(Pictures(), ToArray(path), seed=0)
    sampler = EpochSampler(dataset, 1, 0, training=True, seed=0)
    sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in ResumableLoader(dataset, 4, sampler=sampler, num_workers=num_workers)])


def test_workers_augment_differently_and_repeatably(pipeline):
    alone, two, later = batches(pipeline, 0, 0), batches(pipeline, 2, 0), batches(pipeline, 0, 1)
    assert alone.shape == (16, 12, 12, 3)
    # Batches of one worker repeat those of the other where albumentations seeds itself.
    assert len(alone.flatten(1).unique(dim=0)) == 16
    assert torch.equal(alone, two)
    assert len(torch.cat([alone, later]).flatten(1).unique(dim=0)) == 32
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"


def test_pipeline_is_augmentation_only(tmp_path):
    path = tmp_path / "normalised.json"
    albumentations.save(albumentations.Compose([albumentations.Normalize()]), path)
    with pytest.raises(ConfigError, match=r"returns float32, not a uint8 image. Remove Normalize"):
        AlbumentationsTransform(path)(Pictures.picture)


def test_wrong_pipelines(tmp_path):
    with pytest.raises(ConfigError, match=r"The albumentations pipeline .* does not exist"):
        AlbumentationsTransform(tmp_path / "nowhere.json")
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a pipeline saved by albumentations.save"):
        AlbumentationsTransform(tmp_path / "wrong.json")


@pytest.mark.parametrize(
    ("installed", "error", "message"),
    [
        ({"albumentationsx": "2.0.8"}, ConfigError, "albumentationsx .AGPL. is installed"),
        ({"albumentations": "1.4.0"}, ConfigError, "albumentations 1.4.0 is installed"),
        ({}, MissingPackageError, r"pip install 'visionattn\[albumentations\]'"),
    ],
)
def test_other_packages_are_refused(tmp_path, monkeypatch, installed, error, message):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    path = tmp_path / "pipeline.json"
    path.write_text("{}")
    with pytest.raises(error, match=message):
        AlbumentationsTransform(path)
