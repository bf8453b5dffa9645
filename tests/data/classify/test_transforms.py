"""The last transform of an image: torchvision's values, to the last bit, and its memory order."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from visionattn.data.classify.transforms import Normalize

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_values_are_torchvisions(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 64, channels), dtype=np.uint8)
    pixels[:4] = np.arange(256).reshape(4, 64, 1)
    image = Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)
    mean, std = MEAN[:channels], STD[:channels]
    one_by_one = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    found, expected = pickle.loads(pickle.dumps(Normalize(mean, std)))(image), one_by_one(image)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    memory_format = torch.contiguous_format if channels == 1 else torch.channels_last
    assert found[None].is_contiguous(memory_format=memory_format)
    assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
