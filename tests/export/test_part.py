from __future__ import annotations

import pytest

from tests.export import toys
from visionattn.errors import InputError
from visionattn.export.part import Form, whole


def part(**settings):
    known = {"input_size": None, "dynamic_size": None, "opset": 20, "weights": "drawn", "license": None, "batch": None}
    return whole(toys.Toy(), "toy.onnx", Form(**{**known, **settings}))


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
