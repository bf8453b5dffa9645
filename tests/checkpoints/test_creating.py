"""Creating models by name: mistakes and missing files are told in one line."""

import time

import pytest
import timm

from visionattn.checkpoints import create
from visionattn.errors import CheckpointError, ConfigError, InputError


def test_files_that_checkpoint_path_names():
    with pytest.raises(CheckpointError, match=r"There is no file nowhere\.pth, which checkpoint_path names"):
        create("va_minimal_vit_nano_patch7_28", checkpoint_path="nowhere.pth")


def test_mistakes_within_a_constructor_are_told_as_such():
    with pytest.raises(ConfigError, match=r"cannot be built with depth='x': TypeError: unsupported operand"):
        create("va_minimal_vit_nano_patch7_28", depth="x")
    with pytest.raises(ConfigError, match=r"'test_vit' cannot be built with num_heads=5: "):
        create("test_vit", num_heads=5)


def test_published_weights_of_another_number_of_channels():
    with pytest.raises(InputError, match=r"weights of va_span_ch26_x2 are for images of 3 channels; got in_chans=1"):
        timm.create_model("va_span_ch26_x2", pretrained=True, in_chans=1)


def test_a_network_that_cannot_be_reached_is_one_line_at_once(monkeypatch, tmp_path):
    def unreachable(*args):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"'test_vit' could not be downloaded: .* cannot be reached \(Name or"):
        create("test_vit", pretrained=True, cache_dir=str(tmp_path))
    assert time.monotonic() - start < 5
