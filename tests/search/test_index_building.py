"""Indexing a folder: what a stopped run leaves, what is brought up to date, what cannot be read, and wrong input."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("faiss")

from tests.retrieval_toys import ToyConditional, picture, toy, write_pictures
from visionattn.data.classify.transforms import middle
from visionattn.data.retrieval.embedding import embed
from visionattn.errors import CheckpointError, DataError, InputError, StorageError
from visionattn.files import exclusive
from visionattn.models import match_stereo, span
from visionattn.search import building as index_building
from visionattn.search import files as index_files
from visionattn.search.building import update_index
from visionattn.search.image_index import ImageIndex, build_index, find_images, read_upright


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_building, "BLOCK", 5)
    monkeypatch.setattr(index_building, "BATCH", 2)


@pytest.fixture
def embedded(monkeypatch):
    """Numbers of images of each pass of a model."""
    calls = []
    monkeypatch.setattr(index_building, "embed", lambda model, x: calls.append(len(x)) or embed(model, x))
    return calls


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def vectors(index):
    """Name of each image -> (C, E)."""
    columns = [
        index_files.read_vectors(index.folder, index.manifest, number) for number in range(len(index.conditions))
    ]
    return dict(zip(index.images, np.stack(columns, axis=1)))


def stops(monkeypatch, name, calls):
    """Let a function of the module be interrupted at its n-th call."""
    function, left = getattr(index_building, name), [calls]

    def stopped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(index_building, name, stopped)
    return lambda: monkeypatch.setattr(index_building, name, function)


def test_a_stopped_run_ends_with_the_same_bytes(folder, tmp_path, small_blocks, monkeypatch):
    (folder / "07_bad.png").write_bytes(b"no image")
    whole = build_index(folder, tmp_path / "whole", toy(), "toy")
    assert len(whole) == 1
    assert "07_bad.png" in whole[0]
    resume = stops(monkeypatch, "embed", 5)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tmp_path / "index", toy(), "toy")
    with pytest.raises(DataError, match="is unfinished: run visionattn index again"):
        ImageIndex(tmp_path / "index")
    assert len(list((tmp_path / "index/parts").glob("*.safetensors"))) == 1
    resume()
    calls = []
    monkeypatch.setattr(
        index_building, "embed", lambda model, images: calls.append(len(images)) or embed(model, images)
    )
    assert build_index(folder, tmp_path / "index", toy(), "toy") == whole
    assert sum(calls) == 18 - 5
    assert files(tmp_path / "index") == files(tmp_path / "whole")
    # Nothing is done twice.
    calls.clear()
    assert build_index(folder, tmp_path / "index", toy(), "toy") == whole
    assert calls == []
    assert files(tmp_path / "index") == files(tmp_path / "whole")


def test_images_are_added_removed_and_refreshed(folder, tmp_path, embedded):
    build_index(folder, tmp_path / "index", toy(), "toy")
    embedded.clear()
    picture("blue", "disc", 77).save(folder / "new.png")
    (folder / "03_green_bars.png").unlink()
    picture("green", "columns", 78).save(folder / "05_green_disc.png")
    update = update_index(folder, tmp_path / "index", toy(), "toy")
    assert (update.added, update.removed) == (["new.png"], ["03_green_bars.png"])
    assert (update.refreshed, update.failures) == (["05_green_disc.png"], [])
    assert embedded == [2]
    index = ImageIndex(tmp_path / "index")
    assert index.images == find_images(folder)
    build_index(folder, tmp_path / "anew", toy(), "toy")
    expected = vectors(ImageIndex(tmp_path / "anew"))
    for name, own in vectors(index).items():
        np.testing.assert_allclose(own, expected[name], atol=1e-6)
    assert not (tmp_path / "index/parts").exists()


def test_moved_renamed_and_touched_images_keep_their_vectors(folder, tmp_path, embedded):
    build_index(folder, tmp_path / "index", toy(), "toy")
    embedded.clear()
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved/00_red_bars.png").rename(tmp_path / "moved/renamed.png")
    os.utime(tmp_path / "moved/01_red_columns.png", (1, 1))
    update = update_index(tmp_path / "moved", tmp_path / "index", toy(), "toy")
    assert embedded == []
    assert (update.added, update.removed, update.refreshed) == (["renamed.png"], ["00_red_bars.png"], [])
    index = ImageIndex(tmp_path / "index")
    assert index.manifest["folder"] == str(tmp_path / "moved")
    query = index.embed(toy(), read_upright(tmp_path / "moved/renamed.png"))
    assert index.search(query, {"colour": 1.0, "kind": 1.0}, 1)[0].image == "renamed.png"


def test_content_decides_where_times_do_not_tell(folder, tmp_path, embedded):
    path = folder / "00_red_bars.png"
    Image.new("RGB", (24, 24), "red").save(path.with_suffix(".bmp"))
    path = path.with_suffix(".bmp")
    build_index(folder, tmp_path / "index", toy(), "toy")
    embedded.clear()
    status = path.stat()
    Image.new("RGB", (24, 24), "blue").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert update_index(folder, tmp_path / "index", toy(), "toy").refreshed == []
    assert update_index(folder, tmp_path / "index", toy(), "toy", overwrite=True).refreshed == [path.name]
    assert embedded == [1]


def test_other_folders_and_models_need_a_word(folder, tmp_path):
    build_index(folder, tmp_path / "index", toy(), "toy")
    with pytest.raises(InputError, match=r"holds an index of another model: give --overwrite"):
        build_index(folder, tmp_path / "index", toy(1), "toy")
    with pytest.raises(InputError, match=r"holds an index with other preprocessing: give --overwrite"):
        build_index(folder, tmp_path / "index", toy(), "toy", image_size=(32, 32))
    shutil.copytree(folder, tmp_path / "copies")
    with pytest.raises(InputError, match=r"holds an index of the folder .*pictures: give --overwrite"):
        build_index(tmp_path / "copies", tmp_path / "index", toy(), "toy")
    build_index(tmp_path / "copies", tmp_path / "index", toy(), "toy", overwrite=True)
    build_index(folder, tmp_path / "index", toy(1), "toy", overwrite=True)
    index = ImageIndex(tmp_path / "index")
    index.check(toy(1), "toy")
    with pytest.raises(CheckpointError, match=r"made by toy with the weights \w{12}; other has"):
        index.check(toy(), "other")


def test_unfinished_parts_of_another_model_are_not_taken(folder, tmp_path, small_blocks, monkeypatch):
    build_index(folder, tmp_path / "whole", toy(1), "toy")
    resume = stops(monkeypatch, "stage", 1)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tmp_path / "index", toy(0), "toy")
    resume()
    assert len(list((tmp_path / "index/parts").glob("*.safetensors"))) == 4
    build_index(folder, tmp_path / "index", toy(1), "toy")
    assert files(tmp_path / "index") == files(tmp_path / "whole")


def test_parts_of_the_first_version_and_damaged_ones_are_made_again(folder, tmp_path, small_blocks, monkeypatch):
    build_index(folder, tmp_path / "whole", toy(), "toy")
    resume = stops(monkeypatch, "embed", 8)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tmp_path / "index", toy(), "toy")
    resume()
    parts = tmp_path / "index/parts"
    first = sorted(parts.glob("*.safetensors"))[0]
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    np.savez(parts / "000000000.npz", places=np.arange(5), failures=np.array([], str), vectors=np.ones((5, 2, 8)))
    (parts / "plan.json").write_text("{}")
    build_index(folder, tmp_path / "index", toy(), "toy")
    expected = vectors(ImageIndex(tmp_path / "whole"))
    for name, own in vectors(ImageIndex(tmp_path / "index")).items():
        np.testing.assert_allclose(own, expected[name], atol=1e-6)
    assert not parts.exists()


@pytest.mark.parametrize("at", range(1, 9))
def test_a_run_killed_while_it_replaces_an_index_is_finished_by_the_next(folder, tmp_path, monkeypatch, at, embedded):
    monkeypatch.setattr(index_building, "BATCH", 1)  # the last bits of an embedding depend on the size of its batch
    build_index(folder, tmp_path / "index", toy(), "toy")
    (folder / "00_red_bars.png").unlink()
    build_index(folder, tmp_path / "whole", toy(), "toy")
    embedded.clear()
    steps = {"replace": os.replace, "unlink": os.unlink, "rmdir": os.rmdir}
    left = [at]

    def killed(function):
        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:  # nothing is tidied after a kill
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return step

    for name, function in steps.items():
        monkeypatch.setattr(index_files.os, name, killed(function))
    with pytest.raises(KeyboardInterrupt):
        build_index(folder, tmp_path / "index", toy(), "toy")
    for name, function in steps.items():
        monkeypatch.setattr(index_files.os, name, function)
    build_index(folder, tmp_path / "index", toy(), "toy")
    assert embedded == []
    assert files(tmp_path / "index") == files(tmp_path / "whole")


def test_a_second_run_on_the_same_folder_is_refused(folder, tmp_path):
    def hold(ready, done):
        with exclusive(tmp_path / "index"):
            ready.set()
            done.wait(60)

    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(StorageError, match="Another run is writing to"):
        build_index(folder, tmp_path / "index", toy(), "toy")
    done.set()
    other.join()
    assert build_index(folder, tmp_path / "index", toy(), "toy") == []


def test_files_of_the_user_stay(folder, tmp_path):
    output = tmp_path / "index"
    (output / "parts").mkdir(parents=True)
    for name in ("parts/mine.png", "parts/notes.txt", "mine.faiss"):
        (output / name).write_text("mine")
    build_index(folder, output, toy(), "toy")
    assert {(output / name).read_text() for name in ("parts/mine.png", "parts/notes.txt", "mine.faiss")} == {"mine"}
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "my app"}')
    with pytest.raises(InputError, match=r"manifest\.json is damaged: the entry format is missing.* Give --overwrite"):
        build_index(folder, tmp_path / "web", toy(), "toy")
    assert (tmp_path / "web/manifest.json").read_text() == '{"name": "my app"}'


def test_a_damaged_index_is_replaced_only_when_told(folder, tmp_path):
    build_index(folder, tmp_path / "index", toy(), "toy")
    whole = files(tmp_path / "index")
    for name, content in (("manifest.json", b"{"), ("01.faiss", whole["01.faiss"][:-4])):
        (tmp_path / "index" / name).write_bytes(content)
        with pytest.raises(InputError, match="Give --overwrite to replace it"):
            build_index(folder, tmp_path / "index", toy(), "toy")
        build_index(folder, tmp_path / "index", toy(), "toy", overwrite=True)
        assert files(tmp_path / "index") == whole


def test_hidden_images_and_pipes_are_left_out_and_names_without_utf_8_kept(folder, tmp_path):
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.png", ".hidden.png"):
        picture("red", "disc").save(folder / name)
    os.mkfifo(folder / "pipe.png")
    odd = os.fsdecode(b"\xff[red]\n.PNG")
    picture("red", "disc").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(folder / odd)
    assert build_index(folder, tmp_path / os.fsdecode(b"index\xfe"), toy(), "toy") == []
    index = ImageIndex(tmp_path / os.fsdecode(b"index\xfe"))
    assert len(index.images) == 19
    assert odd in index.images
    hits = index.search(index.embed(toy(), read_upright(folder / odd)), {"colour": 1.0}, 1)
    assert hits[0].image == odd


def test_unreadable_images_are_listed_and_tried_again(folder, tmp_path):
    for number in range(2):
        (folder / f"bad{number}.png").write_bytes(b"no image")
    failures = build_index(folder, tmp_path / "index", toy(), "toy")
    assert [name in line for name, line in zip(("bad0.png", "bad1.png"), failures)] == [True, True]
    picture("red", "disc").save(folder / "bad0.png")
    update = update_index(folder, tmp_path / "index", toy(), "toy")
    assert update.added == ["bad0.png"]
    assert ["bad1.png" in line for line in update.failures] == [True]
    for number in range(2, 7):
        (folder / f"bad{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"6 of the 25 images cannot be read\. The first: .*bad1\.png"):
        build_index(folder, tmp_path / "index", toy(), "toy")
    assert len(ImageIndex(tmp_path / "index").images) == 19


def test_an_image_of_extreme_aspect_is_cut_before_it_is_resized(folder, tmp_path):
    for name, size in (("wide.png", (60_000, 2)), ("tall.png", (1, 60_000))):
        Image.new("RGB", size, "red").save(folder / name)
    assert [middle(Image.new("RGB", size)).size for size in ((60_000, 2), (1, 60_000))] == [(32, 2), (1, 16)]
    assert build_index(folder, tmp_path / "index", toy(), "toy") == []
    index = ImageIndex(tmp_path / "index")
    wide, tall = (vectors(index)[name] for name in ("wide.png", "tall.png"))
    np.testing.assert_allclose(wide, index.embed(toy(), Image.new("RGB", (24, 24), "red")), atol=1e-5)
    np.testing.assert_allclose(wide, tall, atol=1e-5)


def test_weights_and_embeddings_that_are_not_finite_make_no_index(folder, tmp_path):
    broken = toy()
    broken.heads[1].weight.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"weights of toy are damaged: heads\.1\.weight is not finite in float32"):
        build_index(folder, tmp_path / "index", broken, "toy")

    class Overflowing(ToyConditional):
        def forward(self, x):
            found = super().forward(x)
            return found / (x[:, 0].mean(dim=(1, 2)) >= x[:, 2].mean(dim=(1, 2)))[:, None, None]

    with pytest.raises(InputError, match=r"toy returns an embedding of \S*png that is not finite"):
        build_index(folder, tmp_path / "index", Overflowing(("colour", "kind"), 8).eval(), "toy")
    with pytest.raises(DataError, match=r"unfinished|holds no index"):
        ImageIndex(tmp_path / "index")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: span.va_span_ch26_x2(), "it is a 'restore' model; a 'retrieve' or 'classify' model is required"),
        (
            lambda: match_stereo.va_match_stereo_nano(),
            "it is a 'stereo' model; a 'retrieve' or 'classify' model is required",
        ),
        (lambda: torch.nn.Conv2d(3, 4, 3), r"for one image it returns \(1, 4, 22, 22\), not embeddings"),
        (lambda: torch.nn.Conv2d(5, 4, 3), "cannot embed an image of 24 x 24 pixels"),
        (lambda: torch.nn.Bilinear(3, 3, 2), "cannot embed an image of 24 x 24 pixels"),
    ],
)
def test_models_without_embeddings_are_refused(folder, tmp_path, model, words):
    made = model().eval()
    if not hasattr(made, "pretrained_cfg"):
        made.pretrained_cfg = toy().pretrained_cfg
    with pytest.raises(InputError, match=words):
        build_index(folder, tmp_path / "index", made, "file.ckpt")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("size", [(0, 0), (-1, 24), (24, 10**9), (24,), (24, 24, 24)])
def test_impossible_sizes_are_refused(folder, tmp_path, size):
    with pytest.raises(InputError, match=r"image size must be height and width from 1 to 8192; got"):
        build_index(folder, tmp_path / "index", toy(), "toy", image_size=size)


def test_wrong_input(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There are no images in"):
        build_index(tmp_path / "empty", tmp_path / "other", toy(), "toy")
    assert not (tmp_path / "other").exists()
    for name in ("nowhere", "n" * 300, "a\0b"):
        with pytest.raises(DataError, match=r"There is no folder|Cannot read the folder"):
            build_index(tmp_path / name, tmp_path / "other", toy(), "toy")
        if name != "nowhere":
            with pytest.raises(StorageError, match="Cannot write to the folder"):
                build_index(folder, tmp_path / name, toy(), "toy")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write to the folder"):
        build_index(folder, tmp_path / "file", toy(), "toy")
    (tmp_path / "empty/a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"None of the 1 images can be read\. The first: .*a\.png"):
        build_index(tmp_path / "empty", tmp_path / "other", toy(), "toy")
    classifier = toy()
    classifier.attributes, classifier.num_classes = (), 10
    with pytest.raises(InputError, match="is a classifier"):
        build_index(folder, tmp_path / "third", classifier, "classifier")


def test_pictures_are_read_upright_and_on_white(tmp_path):
    image = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert np.unique(np.asarray(read_upright(tmp_path / "clear.png"))).tolist() == [255]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert (read_upright(tmp_path / "turned.jpg").size, read_upright(tmp_path / "turned.jpg").mode) == ((4, 6), "RGB")
    Image.fromarray(np.full((4, 6), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_upright(tmp_path / "deep.png")).max() == 255
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_upright(tmp_path / "pipe.png")


def test_an_index_of_the_first_version_is_brought_up_to_date(folder, tmp_path, embedded):
    build_index(folder, tmp_path / "index", toy(), "toy")
    embedded.clear()
    path = tmp_path / "index/manifest.json"
    old = json.loads(path.read_text())
    for entry in ("checksum", "checksums", "digests"):
        del old[entry]
    path.write_text(json.dumps(old))
    picture("blue", "disc", 77).save(folder / "new.png")
    update = update_index(folder, tmp_path / "index", toy(), "toy")
    assert (update.added, embedded) == (["new.png"], [1])
    assert len(ImageIndex(tmp_path / "index").manifest["digests"]) == 19
