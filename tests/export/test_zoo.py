"""Every name of the zoo is exported with random weights and checked: `make test-export`, an hour or two."""

import pytest

import visionattn
from tests.export.contract import check_for_mobile
from visionattn.models import names

# The symbolic sizes of their many layers take longer than any other network's.
SECONDS = {name: 1800.0 for name in names() if name.startswith("va_match_")}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_name_is_exported(name, tmp_path):
    files = visionattn.export(name, tmp_path / "model.onnx", random_weights=True, time_limit=SECONDS.get(name, 300.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.path.name for file in files)
    for file in files:
        assert file.spec.weights == "random"
        assert file.rows
        assert all(row.passed for row in file.rows)
        check_for_mobile(file.path)
