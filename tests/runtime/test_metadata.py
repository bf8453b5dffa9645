"""Metadata as the export writes them, and what no export writes."""

import pytest

from tests.export.toys import Toy
from visionattn.export.spec import ExportSpec
from visionattn_runtime import RunError
from visionattn_runtime.metadata import read_metadata

TEXTS = ExportSpec.of(Toy(), None, None, 20, "drawn", None).to_metadata()


def test_every_entry_is_the_specs():
    found, spec = read_metadata(TEXTS), ExportSpec.from_metadata(TEXTS)
    assert {key for key, value in found.items() if value is not None} <= set(TEXTS)
    for key, value in found.items():
        assert value == getattr(spec, key, None)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model", None, "model is missing"),
        ("input_size", None, "input_size is missing"),
        ("input_size", "[3, 8", "input_size is not JSON"),
        ("input_size", "[" * 100_000, "input_size is not JSON"),
        ("input_size", "[3, 8]", "sizes must be whole numbers"),
        ("input_size", "[3, 8, 0]", "sizes must be whole numbers"),
        ("input_size", "3", "input_size has the wrong type"),
        ("input_size", "[3, true, 8]", "input_size has the wrong type"),
        ("scale", "0", "sizes must be whole numbers"),
        ("batch", "1e99", "batch has the wrong type"),
        ("radius", "-1", "radius must be at least 0"),
        ("input_names", "[]", "must name an input"),
        ("mean", "[NaN, 0, 0]", "mean is not finite"),
        ("mean", "[0, 0]", "mean must be 3 finite numbers"),
        ("std", "[1, 0, 1]", "std must be above 0"),
        ("input_range", "[0]", "input_range must be 2"),
        ("crop_pct", "0", "crop_pct must be above 0"),
        ("crop_mode", "lost", "crop_mode must be one of center, squash, border; got lost"),
        ("interpolation", "lost", "interpolation must be one of"),
        ("input_layout", "CHWN", "input_layout must be one of"),
    ],
)
def test_what_no_export_writes(key, value, told):
    texts = {name: text for name, text in {**TEXTS, key: value}.items() if text is not None}
    with pytest.raises(RunError, match=told):
        read_metadata(texts)
