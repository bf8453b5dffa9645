"""What a run keeps: damage is found, and what is lost is computed again."""

import resource
import shutil
import zipfile

import pytest
import torch

from tests.probe.runs import table, tiny
from visionattn.cli import main


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("seconds.json", b'{"tokens": 1'),
        ("seconds.json", b'{"tokens": "long"}'),
        ("neighbours.pt", b"nothing"),
        ("neighbours.pt", [1, 2]),
        ("neighbours.pt", {(0, "class"): [{"k": 5}]}),
        ("pixels.pt", {"neighbours": {}, "linear": 3}),
    ],
)
def test_damaged_state_is_computed_again(images, done, tmp_path, capsys, name, content):
    out = shutil.copytree(done, tmp_path / "out")
    (file,) = out.glob(f"state/*/{name}")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert main(tiny(images, out)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{name}" in shown
    assert "It is computed again." in shown
    assert table(out) == table(done)


def test_a_flipped_bit_in_the_heads_is_an_error(images, done, tmp_path, capsys):
    out = shutil.copytree(done, tmp_path / "out")
    (file,) = out.glob("state/*/sweep.pt")
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        place = archive.open(largest)._orig_compress_start
    content = bytearray(file.read_bytes())
    content[place + 100] ^= 1
    file.write_bytes(content)
    assert main(tiny(images, out)) == 2
    told = capsys.readouterr().err
    assert "sweep.pt" in told
    assert "Delete it to start again" in told


def test_a_full_disk_is_one_line_and_the_run_goes_on(images, done, tmp_path, capsys):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert main(tiny(images, out, "--epochs", "1")) == 0
    (file,) = out.glob("state/*/sweep.pt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size - 1, limits[1]))
    capsys.readouterr()
    try:
        assert main(tiny(images, out, "--overwrite")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err
    assert "Could not write" in told
    assert told.count("\n") == 1
    assert main(tiny(images, out, "--overwrite")) == 0
    assert table(out) == table(done)
