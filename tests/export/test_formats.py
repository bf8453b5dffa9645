from __future__ import annotations

import pytest

from visionattn.errors import InputError
from visionattn.export.formats import find_format


def test_the_suffix_says_the_format():
    assert [find_format(name) for name in ("a.onnx", "a.ORT", "a.b.pt2")] == ["onnx", "ort", "pt2"]
    assert find_format("a.ort", "ort") == "ort"
    for output, format, message in (
        ("a.tflite", None, "must end in .onnx or .ort or .pt2"),
        ("a.tflite", "ort", "must end in .ort"),
        ("a.onnx", "ort", "a.onnx must end in .ort for this format"),
        ("a.onnx", "tflite", "must be one of 'onnx', 'ort', 'pt2'; got 'tflite'"),
    ):
        with pytest.raises(InputError, match=message):
            find_format(output, format)
