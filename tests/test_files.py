"""A file is written whole or not at all."""

import resource
import subprocess
import sys

import pytest

from visionattn.errors import MissingPackageError, StorageError, require
from visionattn.files import atomic_path


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.suffix == ".txt"
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Could not write"), atomic_path(tmp_path / "file" / "a.txt"):
        pass


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_a_full_disk_leaves_nothing(tmp_path):
    code = f"""
import resource
from visionattn.files import atomic_path
from visionattn.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_path({str(tmp_path / "a.bin")!r}) as temporary:
        temporary.write_bytes(bytes(10_000))
except StorageError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Nothing was left there." in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingPackageError, match=r"pip install 'visionattn\[export\]'"):
        require("not_a_package", "export")
