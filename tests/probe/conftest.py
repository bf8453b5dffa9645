"""One small backbone for the tests of a file."""

import pytest
import torch

from tests.probe.stores import vit
from visionattn.probe.tokens.backbone import Backbone


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(vit(reg_tokens=2), [0, -1], image_size=32)
