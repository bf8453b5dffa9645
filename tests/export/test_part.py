from __future__ import annotations

import pytest
import torch

from tests.export import toys
from visionattn.errors import InputError
from visionattn.export.part import Form, whole


class Recorded(toys.Toy):
    """Records the devices on which it runs; with `needs_values` it reads one of the image."""

    def __init__(self, needs_values: bool) -> None:
        super().__init__()
        self.needs_values = needs_values
        self.devices: list[str] = []

    def __deepcopy__(self, memo):
        copied = Recorded(self.needs_values)
        copied.devices = self.devices
        return copied

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        self.devices.append(image.device.type)
        return super().forward(image * image.max().item() if self.needs_values else image)


def part(model=None, **settings):
    known = {"input_size": None, "dynamic_size": None, "opset": 20, "weights": "drawn", "license": None, "batch": None}
    return whole(model or toys.Toy(), "toy.onnx", Form(**{**known, **settings}))


def test_dynamic_inputs_are_no_special_case():
    found = part()
    assert found.spec.axes == [{0: "batch", 2: "height", 3: "width"}]
    assert [tuple(image.shape) for image in found.inputs] == [(2, 3, 41, 53)]  # 32 x 1.25 and x 1.5, as primes
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_fixed_inputs_have_their_size():
    found = part(dynamic_size=False, batch=4, input_size=(20, 24))
    assert found.spec.axes == [{}]
    assert [tuple(image.shape) for image in found.inputs] == [(4, 3, 20, 24)]


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match="The batch must be at least 1; got 0"):
        part(batch=0)


@pytest.mark.parametrize(("needs_values", "devices"), [(False, ["meta"]), (True, ["meta", "cpu"])])
def test_outputs_are_computed_only_where_shapes_do_not_suffice(needs_values, devices):
    model = Recorded(needs_values)
    part(model)
    assert model.devices == devices
