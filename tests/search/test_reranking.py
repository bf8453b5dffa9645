"""Re-ranking a search by patches: whose order it is, what is refused, and what the command says."""

import json

import pytest
import timm
import torch

pytest.importorskip("faiss")

import visionattn
from tests.blocks.contract import randomise
from tests.retrieval_toys import toy, write_pictures
from visionattn import cli
from visionattn.blocks.rerank import PairEncoder
from visionattn.data.retrieval.embedding import eval_transform
from visionattn.data.retrieval.patches import read_patches
from visionattn.errors import CheckpointError, DataError, InputError
from visionattn.search.building import read_upright

QUERY = "pictures/00_red_bars.png"


def backbone(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, img_size=32).eval()


def save(path, model, **changed):
    torch.manual_seed(1)
    encoder = randomise(PairEncoder(64, 16, 1))
    state = {f"pair_encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {f"base.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, **changed}}, path)
    return encoder.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    write_pictures(folder / "pictures")
    model = backbone()
    torch.save(model.state_dict(), folder / "vit.pth")
    named = {"checkpoint": folder / "vit.pth", "image_size": 32}
    visionattn.index(folder / "pictures", folder / "index", "test_vit", **named, device="cpu", progress=False)
    encoder = save(folder / "pairs.ckpt", model)
    return folder, encoder


@pytest.fixture
def index(made, monkeypatch):
    monkeypatch.chdir(made[0])
    found = visionattn.search.ImageIndex("index")
    found.model = backbone()
    return found


def test_hits_have_the_order_and_scores_of_the_pair_encoder(index, made):
    plain = visionattn.search(index, QUERY, top=17)
    hits = visionattn.search(index, QUERY, top=17, rerank="pairs.ckpt")
    prepare = eval_transform(index.manifest["input"])

    def patches(path):
        return read_patches(index.model, prepare(read_upright(path))[None])

    with torch.no_grad():
        scores = {
            hit.image: made[1].compare(patches(QUERY), patches(f"pictures/{hit.image}")).sigmoid().item()
            for hit in plain
        }
    assert [hit.image for hit in hits] == sorted(scores, key=lambda name: -scores[name])
    assert [hit.image for hit in hits] != [hit.image for hit in plain]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)
    assert {hit.image: hit.cosines for hit in hits} == {hit.image: hit.cosines for hit in plain}


def test_the_best_of_all_candidates_are_found_not_of_the_nearest(index):
    every = visionattn.search(index, QUERY, top=17, rerank="pairs.ckpt")
    assert visionattn.search(index, QUERY, top=3, rerank="pairs.ckpt") == every[:3]


def test_images_that_are_gone_are_left_out_and_told(index, tmp_path):
    write_pictures(tmp_path / "moved")
    (tmp_path / "moved/04_green_columns.png").unlink()
    hits = visionattn.search(index, QUERY, top=17, rerank="pairs.ckpt", images=tmp_path / "moved")
    assert len(hits) == 16
    assert "1 of the nearest images could not be read, such as 04_green_columns.png: left out." in hits.notes
    with pytest.raises(DataError, match="None of the 17 nearest images can be read in"):
        visionattn.search(index, QUERY, rerank="pairs.ckpt", images=tmp_path / "nowhere")


def test_an_index_of_another_model_is_refused(index, tmp_path):
    save(tmp_path / "other.ckpt", backbone(seed=1))
    with pytest.raises(CheckpointError, match=r"other\.ckpt was trained with the model weights"):
        visionattn.search(index, QUERY, rerank=tmp_path / "other.ckpt")


def test_more_than_50_images_are_refused(index):
    with pytest.raises(InputError, match=r"With re-ranking, the number of images to find must be at most 50; got 51"):
        visionattn.search(index, QUERY, top=51, rerank="pairs.ckpt")


def test_an_index_of_attributes_is_refused(index, tmp_path):
    attributes = visionattn.index("pictures", tmp_path / "index", toy(), device="cpu", progress=False)
    with pytest.raises(InputError, match="has 2 attributes; re-ranking requires an index with one attribute"):
        visionattn.search(attributes, QUERY, "colour", rerank="pairs.ckpt")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pair_encoder.embed.weight": torch.zeros(16)}, "no weights of a known form"),
        ({"pair_encoder.embed.weight": torch.zeros(17, 64)}, "no weights of a known form"),
        ({"pair_encoder.gain": torch.zeros(2)}, r"gain is \(2,\), not \(\)"),
        ({"pair_encoder.gain": torch.tensor(torch.nan)}, "NaN or infinite values"),
        ({"pair_encoder.blocks.7.norm": torch.zeros(2)}, "is damaged: its pair encoder has"),
    ],
)
def test_damaged_files_are_refused(index, tmp_path, changed, words):
    save(tmp_path / "bad.ckpt", backbone(), **changed)
    with pytest.raises(CheckpointError, match=words):
        visionattn.search(index, QUERY, rerank=tmp_path / "bad.ckpt")


@pytest.mark.parametrize(
    "content", [{}, {"state_dict": {}}, {"state_dict": 3}, {"state_dict": {"net.a": torch.ones(1)}}, [1]]
)
def test_files_without_a_pair_encoder_are_refused(index, tmp_path, content):
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        visionattn.search(index, QUERY, rerank=tmp_path / "bad.ckpt")


def test_pair_encoders_of_any_number_of_blocks_are_not_built(index, tmp_path):
    save(tmp_path / "bad.ckpt", backbone(), **{f"pair_encoder.blocks.{n}.x": torch.ones(1) for n in range(100)})
    with pytest.raises(CheckpointError, match="has 100 blocks; the maximum is 64"):
        visionattn.search(index, QUERY, rerank=tmp_path / "bad.ckpt")


def test_the_command(index, tmp_path, capsys):
    expected = visionattn.search(index, QUERY, rerank="pairs.ckpt")
    command = ["search", "index", QUERY, "--device", "cpu", "--output", str(tmp_path / "found.png")]
    assert cli.main([*command, "--rerank", "pairs.ckpt"]) == 0
    assert expected[0].image in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["hits"]
    assert [hit["image"] for hit in found] == [hit.image for hit in expected]
    assert cli.main([*command, "--overwrite", "--rerank", "nothing.ckpt"]) == 2
    assert "There is no file nothing.ckpt" in capsys.readouterr().err
