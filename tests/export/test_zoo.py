"""Every name of the zoo is exported with random weights and checked: `make test-export`, an hour or two."""

import pytest

import visionattn
from tests.export.contract import check_for_mobile
from visionattn.models import names

# The check of the largest takes several minutes at their own size, 320 x 736, at which smaller ones of the family are.
SIZES = {name: (192, 224) for name in names() if name.startswith("va_match_") and name.endswith("_base")}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_name_is_exported(name, tmp_path):
    files = visionattn.export(name, tmp_path / "model.onnx", random_weights=True, image_size=SIZES.get(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.path.name for file in files)
    for file in files:
        assert file.spec.weights == "random"
        assert file.rows
        assert file.spec.unchecked == []
        assert all(row.passed for row in file.rows)
        check_for_mobile(file.path)
