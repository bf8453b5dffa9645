"""The files of an index are checked when they are read, and are those of faiss."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest

from visionattn.errors import DataError
from visionattn.search.files import HEADER, Block, read_blocks, write_block
from visionattn.search.image_index import ImageIndex, write_index

MANIFEST = {
    "model": "toy",
    "weights": "0" * 64,
    "input": {"size": [24, 24], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"},
    "conditions": ["colour", "kind"],
    "folder": "/pictures",
    "files": [[f"{number}.png", 100, 10**18] for number in range(4)],
    "images": [f"{number}.png" for number in range(4)],
    "unreadable": [],
}
QUERY = np.zeros((2, 8), np.float32)


@pytest.fixture
def index(tmp_path):
    found = np.random.default_rng(0).standard_normal((4, 2, 8), np.float32)
    write_index(tmp_path / "index", found / np.linalg.norm(found, axis=-1, keepdims=True), MANIFEST)
    return tmp_path / "index"


def test_the_files_are_faisss(index, tmp_path):
    assert sorted(path.name for path in index.iterdir()) == [".lock", "00.faiss", "01.faiss", "manifest.json"]
    for name in ("00.faiss", "01.faiss"):
        read = faiss.read_index(str(index / name))
        assert (type(read), read.ntotal, read.d, read.metric_type) == (faiss.IndexFlatIP, 4, 8, 0)
        faiss.write_index(read, str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == (index / name).read_bytes()


def rewritten(index, **entries):
    """The manifest with other entries and without a checksum, as the first version wrote it."""
    manifest = json.loads((index / "manifest.json").read_text()) | entries
    for entry in ("checksum", "checksums", "digests"):
        manifest.pop(entry, None)
    (index / "manifest.json").write_text(
        json.dumps({key: value for key, value in manifest.items() if value is not ...})
    )


@pytest.mark.parametrize(
    "entry", ["format", "embed_dim", "model", "weights", "input", "conditions", "folder", "images"]
)
@pytest.mark.parametrize("value", [..., None, 1.5, [1]])
def test_an_entry_that_is_missing_or_of_another_type(index, entry, value):
    rewritten(index, **{entry: value})
    with pytest.raises(DataError, match=rf"manifest\.json is damaged: .*{entry}"):
        ImageIndex(index)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"format": 2}, r"has format 2; this version reads format 1"),
        ({"images": []}, "images must be a list of different names"),
        ({"images": ["a.png"] * 4}, "images must be a list of different names"),
        ({"images": ["a\0.png", "b.png", "c.png", "d.png"]}, "NUL byte"),
        ({"conditions": ["colour", "colour"]}, "conditions must be different names"),
        ({"conditions": []}, "conditions must be different names"),
        ({"embed_dim": 0}, "embed_dim at least 1"),
        ({"files": [["0.png", 1]]}, "files must be a list of names, sizes and times"),
        ({"files": {"0.png": 1}}, "files must be a list of names, sizes and times"),
        ({"unreadable": "none"}, "unreadable must be a list of messages"),
    ],
)
def test_entries_that_contradict(index, entries, words):
    rewritten(index, **entries)
    with pytest.raises(DataError, match=words):
        ImageIndex(index)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5])
def test_what_is_no_manifest(index, content):
    (index / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        ImageIndex(index)


def test_one_changed_letter_is_noticed(index):
    path = index / "manifest.json"
    path.write_text(path.read_text().replace('"1.png"', '"9.png"'))
    with pytest.raises(DataError, match="its checksum is wrong"):
        ImageIndex(index)


def test_an_index_of_the_first_version_is_searched(index):
    rewritten(index)
    found = ImageIndex(index)
    hits = found.search(np.eye(2, 8, dtype=np.float32), {"colour": 1.0}, 2)
    assert len(hits) == 2
    assert abs(hits[0].score) <= 1


def faiss_file(kind, dimensions=8, count=4, factor=1.0):
    found = np.random.default_rng(0).standard_normal((count, dimensions), np.float32)
    made = kind(dimensions)
    made.add(np.ascontiguousarray(factor * found / np.linalg.norm(found, axis=-1, keepdims=True)))
    return faiss.serialize_index(made).tobytes()


GOOD = faiss_file(faiss.IndexFlatIP)
HUGE = HEADER.pack(b"IxFI", 8, 2**62, 1 << 20, 1 << 20, True, 0, 2**63) + GOOD[HEADER.size :]
NEGATIVE = HEADER.pack(b"IxFI", 8, -4, 1 << 20, 1 << 20, True, 0, 32) + GOOD[HEADER.size :]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"damaged",
        GOOD[:-4],
        GOOD + b"more",
        HUGE,
        NEGATIVE,
        faiss_file(faiss.IndexFlatL2),
        faiss_file(faiss.IndexFlatIP, dimensions=4),
        faiss_file(faiss.IndexFlatIP, count=5),
        faiss_file(faiss.IndexFlatIP, factor=2.0),
        faiss_file(faiss.IndexFlatIP, factor=np.nan),
        faiss_file(faiss.IndexFlatIP, factor=1e19),
        faiss_file(lambda size: faiss.IndexHNSWFlat(size, 4)),
    ],
)
def test_vectors_that_are_not_those_that_were_written(index, content, old):
    if old:
        rewritten(index)
    (index / "00.faiss").write_bytes(content)
    with pytest.raises(DataError, match=r"00\.faiss (is damaged|has \d+ images, the manifest 4: index the images)"):
        ImageIndex(index).search(QUERY, {"colour": 1.0}, 3)


def test_vectors_that_are_gone_or_of_another_condition(index):
    (index / "00.faiss").write_bytes((index / "01.faiss").read_bytes())
    with pytest.raises(DataError, match=r"00\.faiss is damaged: its checksum is wrong"):
        ImageIndex(index).search(QUERY, {"colour": 1.0}, 3)
    (index / "00.faiss").unlink()
    with pytest.raises(DataError, match=r"00\.faiss: it is missing"):
        ImageIndex(index).search(QUERY, {"colour": 1.0}, 3)


def test_blocks_have_the_identity_of_what_made_them(tmp_path):
    block = Block([["\udcff.png", 1, 2, "d" * 32]], np.ones((1, 2, 3), np.float32), [["b.png", 3, 4, "message"]])
    write_block(tmp_path, 7, "a model", block)
    ((number, read),) = read_blocks(tmp_path, "a model")
    assert (number, read.files, read.failures) == (7, block.files, block.failures)
    assert read.vectors.tolist() == block.vectors.tolist()
    assert list(read_blocks(tmp_path, "another model")) == []
    assert list((tmp_path / "parts").iterdir()) == []
