"""Folders: what is read, what is named as not read, and that no failure ends the whole run."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from tests.predict.upscalers import Repeat, picture, repeated
from visionattn.checkpoints import load
from visionattn.cli import main
from visionattn.data.images import SUFFIXES
from visionattn.errors import DataError, StorageError
from visionattn.files import TEMPORARY
from visionattn.predict import batch, restore_files
from visionattn.predict.batch import Job, Outcome, files_of, target_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the file of a model that repeats pixels, to be named by `--model`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pth").touch()
    monkeypatch.setattr(
        "visionattn.opening.load", lambda path: Repeat(2).eval() if path.name == "net.pth" else load(path)
    )
    return tmp_path


def save(path, pixels=None, **options):
    pixels = picture() if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def upscale(*arguments):
    return main(["upscale", *map(str, arguments), "--model", "net.pth"])


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_sub_folders_are_mirrored(folder):
    pixels = save(folder / "in/day/one/a.png")
    save(folder / "in/night/a.png")
    save(folder / "in/a.PNG")
    assert upscale("in", "out") == 0
    assert written(folder / "out") == ["a.PNG", "day/one/a.png", "night/a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "out/day/one/a.png")), repeated(pixels))


def test_outputs_replace_no_input(folder, capsys):
    save(folder / "in/a.gif", picture(channels=1)[:, :, 0])
    pixels = save(folder / "in/a.png")
    os.symlink(folder / "in/a.png", folder / "linked.png")
    assert upscale("in", "in", "--overwrite") == 1
    assert upscale("in/a.png", "linked.png", "--overwrite") == 1
    told = capsys.readouterr().out
    assert "in/a.gif: the output would replace another input, in/a.png" in told
    assert told.count("the output would replace the input") == 2
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "in/a.png")), pixels)


def test_symbolic_links_that_lead_nowhere(folder, capsys):
    save(folder / "in/a.png")
    os.symlink("loop.png", folder / "in/loop.png")
    os.symlink("gone.png", folder / "in/lost.png")
    assert upscale("in", "in/out") == 1
    assert upscale("in/a.png", "in/loop.png") == 1
    told = capsys.readouterr().out
    assert "unexpected" not in told
    assert "wrote in/out/a.png" in told


def test_formats_that_are_read_but_not_written_become_png(folder):
    for name in ("a.gif", "b.ppm", "c.bmp", "d.pgm"):
        save(folder / "in" / name, picture(channels=1)[:, :, 0])
    assert upscale("in", "out") == 0
    assert written(folder / "out") == ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.skipif(".avif" not in SUFFIXES, reason="this Pillow has no AVIF")
def test_avif_is_read_and_becomes_png(folder):
    save(folder / "in/e.avif")
    assert upscale("in", "out") == 0
    assert written(folder / "out") == ["e.png"]


def test_what_is_not_read_is_named_and_counted(folder, capsys):
    save(folder / "in/a.png")
    (folder / "in/b.HEIC").write_bytes(b"x")
    (folder / "in/notes.txt").write_text("x")
    (folder / "in/gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "in/pipe.png")
    assert upscale("in", "out") == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("left out 1 not a regular file (pipe.png), 1 with suffix .txt (notes.txt)" in line for line in lines)
    failures = [line for line in lines if line.startswith("failed: ")]
    assert [line.partition(": ")[2].split(":")[0] for line in failures] == [
        "Could not read in/b.HEIC",
        "Could not read in/gone.jpg",
        "Could not read in/pipe.png",
    ]
    assert ".HEIC files are not supported" in failures[0]
    assert "it is not a regular file" in failures[2]
    assert lines[-1] == "3 of 4 failed: in/b.HEIC, in/gone.jpg, in/pipe.png"
    assert written(folder / "out") == ["a.png"]


def test_a_pipe_as_input_does_not_wait(folder, capsys):
    os.mkfifo(folder / "pipe.png")
    assert upscale("pipe.png", "out.png") == 1
    assert capsys.readouterr().out == "failed: Could not read pipe.png: it is not a regular file.\n"


def test_hidden_files_and_what_a_killed_run_left_are_no_inputs(folder):
    save(folder / "in/a.png")
    for name in (".b.png", f"{TEMPORARY}0-99999999-x.png", ".git/c.png", "__MACOSX/d.png"):
        save(folder / "in" / name)
    assert upscale("in", "out") == 0
    assert written(folder / "out") == ["a.png"]


def test_outputs_inside_the_input_folder_are_no_inputs(folder, capsys):
    save(folder / "in/a.png")
    assert upscale("in", "in/large") == 0
    assert upscale("in", "in/large", "--skip-existing") == 0
    assert written(folder / "in") == ["a.png", "large/a.png"]
    assert capsys.readouterr().out.splitlines() == ["wrote in/large/a.png", "skipped: in/large/a.png exists"]


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("two\nlines"), OSError(5, "Input/output error"), MemoryError()]
)
def test_any_failure_costs_one_line(folder, capsys, monkeypatch, error):
    for name in "abc":
        save(folder / f"in/{name}.png")
    work = restore_files._Work.__call__

    def fail(self, job, bar, remaining):
        if job.source.name == "b.png":
            raise error
        return work(self, job, bar, remaining)

    monkeypatch.setattr(restore_files._Work, "__call__", fail)
    assert upscale("in", "out") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["wrote", "failed:", "wrote", "1"]
    assert lines[1].startswith("failed: in/b.png: ")
    if isinstance(error, KeyError):
        assert "unexpected KeyError at test_batch.py:" in lines[1]
    assert written(folder / "out") == ["a.png", "c.png"]


def test_names_like_markup_or_with_control_characters(folder, capsys):
    for name in ("[/red].png", "a\nb\x1b[31m.png"):
        save(folder / "in" / name)
    assert upscale("in", "out") == 0
    assert capsys.readouterr().out.splitlines() == ["wrote out/[/red].png", "wrote out/a b\\x1b[31m.png"]


def test_long_names(folder, capsys):
    name = "a" * 251 + ".png"
    save(folder / "in" / name)
    assert upscale("in", "out") == 0
    assert written(folder / "out") == [name]
    assert upscale("in/" + name, "b" * 300 + ".png") == 2
    told = capsys.readouterr()
    assert told.out == f"wrote out/{name}\n"
    assert "File name too long" in told.err
    assert told.err.count("\n") == 1


def test_comparisons_are_not_overwritten_unasked(folder, capsys):
    save(folder / "in.png")
    save(folder / "out_compare.png", picture(2, 2))
    assert upscale("in.png", "out.png", "--compare") == 1
    assert "failed: in.png: out_compare.png exists. Use --overwrite" in capsys.readouterr().out
    assert not (folder / "out.png").exists()
    assert upscale("in.png", "out.png", "--compare", "--overwrite") == 0
    assert Image.open(folder / "out_compare.png").size[0] > 100


def test_an_output_that_is_no_regular_file_stays(folder, capsys):
    save(folder / "in.png")
    os.mkfifo(folder / "out.png")
    assert upscale("in.png", "out.png", "--overwrite") == 1
    assert "it is not a regular file" in capsys.readouterr().out
    assert (folder / "out.png").is_fifo()


@pytest.mark.parametrize(
    "option", [("--memory", v) for v in ("inf", "nan", "-1", "0", "1e300")] + [("--overlap", "-1")]
)
def test_absurd_numbers_are_refused_before_anything_starts(folder, capsys, option):
    save(folder / "in.png")
    assert upscale("in.png", "out.png", *option) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder / "out.png").exists()


def test_paths_that_cannot_be(folder):
    (folder / "file.v1").touch()
    with pytest.raises(StorageError, match="it is a file, not a folder"):
        target_folder("file.v1", several=True)
    with pytest.raises(StorageError, match="null"):
        target_folder("a\0/b.png", several=False)
    for name in ("", "a\0.png"):
        with pytest.raises(StorageError, match="must not be empty"):
            target_folder(name, several=False)
    with pytest.raises(DataError, match="name of an input is empty"):
        files_of("")
    with pytest.raises(DataError, match=r"no file or folder a\\x00b"):
        files_of("a\0b")


def test_progress_is_told_without_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(batch, "SILENCE", 0)

    def work(job, bar, remaining):
        bar.expect(3)
        for _ in range(3):
            time.sleep(0.001)
            bar.advance()
        return []

    (folder / "a.png").touch()
    outcome = batch.run([Job((folder / "a.png",), folder / "b.png")], work, (".png",))
    assert outcome == Outcome(written=[folder / "b.png"])
    assert outcome.exit_code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a.png: 1 of 3, about 1 min left")
    assert len(lines) == 4
