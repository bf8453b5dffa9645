"""Which device `--device` means."""

import pytest
import torch

from visionattn.devices import find_device
from visionattn.errors import InputError


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == torch.device("cuda")


def test_a_device_of_pytorch():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["toaster", "meta", "cpu:x", "", "cuda:77", 3.5])
def test_devices_that_cannot_be_used(device):
    with pytest.raises(InputError, match=r"^The device '.*' cannot be used: .+\.$"):
        find_device(device)
