"""Search by candidates: recall, files that are of other vectors or damaged, and what stays exact."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("faiss")

import visionattn
from tests.retrieval_toys import plain, toy, write_pictures
from visionattn.errors import DataError, InputError
from visionattn.search import image_index, nearest
from visionattn.search.image_index import ImageIndex
from visionattn.search.nearest import build, find_candidates, kind_for


def vectors(count=3000, size=24):
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(40, size))
    found = centres[generator.integers(0, 40, count)] + 0.5 * generator.normal(size=(count, size))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("count", "kind"), [(1, "exact"), (199_999, "exact"), (200_000, "hnsw"), (999_999, "hnsw"), (1_000_000, "ivf")]
)
def test_the_kind_goes_by_the_number(count, kind):
    assert kind_for(count) == kind
    assert kind_for(count, "ivf") == "ivf"
    with pytest.raises(InputError, match="nearest must be one of 'auto', 'exact', 'hnsw', 'ivf'; got 'flat'"):
        kind_for(count, "flat")


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_recall_and_order(kind):
    made, queries = np.split(vectors(3050), [3000])
    candidates = build(made, kind)
    recalls = []
    for query in queries:
        true = np.argsort(-(made @ query), kind="stable")[:10]
        found = find_candidates(candidates, query, made, 10)
        cosines = made[found] @ query
        assert (np.diff(cosines) <= 0).all()
        recalls.append(len({*found.tolist()} & {*true.tolist()}) / 10)
    assert np.mean(recalls) > 0.9


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_few_vectors(kind, count):
    made = vectors(count)
    found = find_candidates(build(made, kind), made[0], made, 10)
    assert found[0] == 0
    assert len(found) <= min(10, count)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    return tmp_path


def index(kind, model=None):
    return visionattn.index("pictures", "index", model or plain(), nearest=kind, device="cpu", progress=False)


QUERY = "pictures/00_red_bars.png"


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_search_is_as_with_all_compared(folder, kind, monkeypatch):
    exact = visionattn.search(index("exact"), QUERY, top=5)
    assert not (folder / "index/00.near").exists()
    near = index(kind)
    asked = []
    monkeypatch.setattr(image_index, "find_candidates", lambda *args: asked.append(args[-1]) or find_candidates(*args))
    found = visionattn.search(near, QUERY, top=5)
    assert [hit.image for hit in found] == [hit.image for hit in exact]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in exact], abs=1e-6)
    assert asked == [6]
    before = (folder / "index/00.near").stat().st_mtime_ns
    index(kind)
    assert (folder / "index/00.near").stat().st_mtime_ns == before
    index("auto")
    assert not (folder / "index/00.near").exists()


def test_several_attributes_are_compared_with_all(folder):
    near = index("hnsw", toy())
    assert {path.name for path in (folder / "index").glob("*.near")} == {"00.near", "01.near"}
    mixed = visionattn.search(near, QUERY, ["colour", "kind"], top=20)
    assert len(mixed) == 17
    exact = visionattn.search(index("exact", toy()), QUERY, "kind", top=3)
    assert [hit.image for hit in visionattn.search(near, QUERY, "kind", top=3)] == [hit.image for hit in exact]


def test_candidates_of_other_vectors_are_not_used(folder):
    index("ivf")
    old = (folder / "index/00.near").read_bytes()
    (folder / "pictures/00_red_bars.png").unlink()
    index("exact")
    (folder / "index/00.near").write_bytes(old)
    assert nearest.open_candidates(folder / "index", ImageIndex("index").manifest, 0) is None
    index("ivf")
    assert (folder / "index/00.near").read_bytes() != old


def test_a_damaged_file_is_told_and_made_again(folder):
    index("ivf")
    path = folder / "index/00.near"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=r"00\.near is damaged: its checksum is wrong"):
        ImageIndex("index").search(np.full((1, 16), 0.25, np.float32), {"image": 1.0}, 3)
    for junk in (b"", b"VANS", good[:15]):
        path.write_bytes(junk)
        assert len(visionattn.search(ImageIndex("index"), QUERY, model=plain(), top=3)) == 3
    index("ivf")
    assert path.read_bytes() == good
