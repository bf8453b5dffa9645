"""One small backbone for the tests of a file; small pictures, and a finished run over them."""

import pytest
import torch

from tests.probe.runs import pictures, tiny
from tests.probe.stores import vit
from visionattn.cli import main
from visionattn.probe.tokens.backbone import Backbone


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(vit(reg_tokens=2), [0, -1], image_size=32)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    pictures(root, {"train": {"none": 8, "one": 8}, "test": {"none": 4, "one": 4}})
    return root


@pytest.fixture(scope="module")
def done(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("done")
    assert main(tiny(images, path)) == 0
    return path
