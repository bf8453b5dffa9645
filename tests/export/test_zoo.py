"""Every name of the zoo is exported with random weights and checked: `make test-export`, an hour or two."""

import pytest

import visionattn
from tests.export.contract import check_for_mobile
from visionattn.models import names

# The symbolic sizes of networks that match two images take longer than any other network's.
SECONDS = {name: 1800.0 for name in names() if name.startswith("va_match_")}
# Larger ones compute too long at their own size, 320 x 736, at which the nano ones are checked.
SIZES = {name: (192, 224) for name in SECONDS if not name.endswith("_nano")}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_name_is_exported(name, tmp_path):
    settings = {"time_limit": SECONDS.get(name, 300.0), "image_size": SIZES.get(name)}
    files = visionattn.export(name, tmp_path / "model.onnx", random_weights=True, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.path.name for file in files)
    for file in files:
        assert file.spec.weights == "random"
        assert file.rows
        assert all(row.passed for row in file.rows)
        check_for_mobile(file.path)
