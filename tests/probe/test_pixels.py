"""The baseline without a network: images averaged to 16 x 16 pixels."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.probe.stores import Images
from visionattn.errors import DataError
from visionattn.probe.pixels import PixelComparison, read_pixels


def test_pixels_are_means_of_blocks():
    raw = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float() / 255
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.25, 0.1)
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    dataset = TensorDataset((raw - shift) / scale, torch.tensor([0, 1, 2, 0, 1]))
    found = read_pixels(dataset, 32, mean, std, ("a", "b", "c"))
    blocks = raw.numpy().reshape(5, 3, 16, 2, 16, 2).mean((3, 5))
    rows = torch.tensor([4, 0])
    ((some, (tokens,)),) = found.batches(rows, 8)
    assert torch.equal(some, rows)
    assert tokens.patches.shape == (2, 1, 768)
    np.testing.assert_allclose(tokens.patches[:, 0].numpy(), blocks[[4, 0]].reshape(2, -1), atol=0.5001 / 255)
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    assert found.classes == ("a", "b", "c")
    assert found.pixels.dtype == torch.uint8


def test_an_image_that_cannot_be_read_any_more():
    with pytest.raises(DataError, match="cannot be read any more: image 4 is truncated"):
        read_pixels(Images(broken=[4]), 32, (0.5,) * 3, (0.5,) * 3, ("a", "b", "c"))


def test_who_wins():
    comparison = PixelComparison("k-NN", 0.423, "k-NN mean", 0.108, 1e-9)
    assert comparison.pixels_win
    assert str(comparison) == "k-NN 42.3 % against 10.8 % of k-NN mean (p = 1e-09)"
    assert not comparison._replace(pixels=0.108).pixels_win
