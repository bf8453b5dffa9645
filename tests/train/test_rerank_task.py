"""Training a pair encoder and an embedding in turn: losses, pairs, phases, resuming, and a search with the result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning")

from lightning.pytorch import Trainer, seed_everything

import visionattn
from tests.retrieval_toys import write_pictures, write_table
from visionattn.data.retrieval.pairs import PairData, choose_pairs
from visionattn.errors import ConfigError
from visionattn.metrics.ranking import score
from visionattn.train.cli import main
from visionattn.train.rerank import RerankTask, embedding_loss, pair_loss, similarity

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "dossiers" / "golden" / "trans_encoder.npz"
MODEL = {"name": "test_vit", "model_args": {"img_size": 32}}


def test_losses_are_those_of_the_published_method():
    # sentence-transformers 2.0.0 on the cosine itself, also where it is negative.
    cosine = torch.tensor([0.9, 0.2, -0.3, 0.05], dtype=torch.float64)
    logits = torch.tensor([1.2, -0.4, 0.3, -2.0], dtype=torch.float64)
    cross = [0.3832824673380312, 0.5930152523999526, 0.9443552444685271, 0.22692801104297278]
    squares = [0.017285732553980217, 0.04052665819099965, 0.7646497152079085, 0.0047890444163992815]
    assert pair_loss(logits, cosine).tolist() == pytest.approx(cross, abs=1e-12)
    assert embedding_loss(cosine, logits).tolist() == pytest.approx(squares, abs=1e-12)


def test_losses_of_the_golden_case():
    if not GOLDEN.exists():
        pytest.skip("the golden numbers are not here")
    case = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(pair_loss(case["logits"], case["cosine"]), case["cross_loss"], **exact)
    torch.testing.assert_close(embedding_loss(case["cosine"], case["logits"]), case["bi_loss"], **exact)


def test_similarity_is_between_0_and_1():
    x = F.normalize(torch.randn(4, 3), dim=1)
    torch.testing.assert_close(similarity(x, x), torch.ones(4))
    torch.testing.assert_close(similarity(x, -x), torch.zeros(4))


def test_pairs_are_the_nearest_and_others_never_the_image_itself(monkeypatch):
    vectors = F.normalize(torch.randn(30, 4), dim=1)
    pairs = choose_pairs(vectors, 3, 2, seed=0).view(30, 5, 2)
    assert (pairs[..., 0] == torch.arange(30)[:, None]).all()
    assert (pairs[..., 0] != pairs[..., 1]).all()
    for row, partners in enumerate(pairs[..., 1]):
        order = (vectors @ vectors[row]).argsort(descending=True)
        assert partners[:3].tolist() == order[order != row][:3].tolist()
    monkeypatch.setattr("visionattn.data.retrieval.pairs.CELLS", 64)  # chunks of two rows
    torch.testing.assert_close(choose_pairs(vectors, 3, 2, seed=0).view(30, 5, 2), pairs)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return str(write_table(tmp_path_factory.mktemp("pairs"), copies=4))


def data(table, **settings):
    return PairData(table, **{"neighbours": 3, "others": 2, "pairs_per_batch": 15, **settings})


def task(found, **settings):
    seed_everything(0, verbose=False)
    return RerankTask(**{**MODEL, "attributes": found.attribute_values, "width": 16, "depth": 1, **settings})


def trainer(folder, epochs, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **quiet, **settings)


class Watched(RerankTask):
    """Keeps what each phase begins with and what it learns."""

    def on_fit_start(self):
        super().on_fit_start()
        self.seen = []

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.seen.append((self.trains_pairs, self._labels.clone(), self.net.norm.weight.clone()))


def test_phases_alternate_and_each_begins_anew(table, tmp_path, monkeypatch):
    found = data(table)
    monkeypatch.setattr("tests.train.test_rerank_task.RerankTask", Watched)
    made = task(found, lr=1e-2)
    start = {key: value.clone() for key, value in made.net.state_dict().items()}
    run = trainer(tmp_path, 4)
    run.fit(made, datamodule=found)
    assert [pair for pair, *_ in made.seen] == [True, False, True, False]
    for key, value in made.base.state_dict().items():
        torch.testing.assert_close(value, start[key])
    # The labels of the first phase are the embedding's, and those of the third the trained embedding's.
    made.eval()
    with torch.no_grad():
        images = torch.cat([images for images, *_ in found.train_images()])
        made.net.load_state_dict(start)
        first, second = made(images)[:, 0][found.pairs].unbind(dim=1)
    torch.testing.assert_close(made.seen[0][1], (1 + (first * second).sum(1)) / 2)
    assert (made.seen[2][1] - made.seen[0][1]).abs().max() > 1e-3
    # Each phase of the embedding begins with the first weights.
    torch.testing.assert_close(made.seen[1][2], start["norm.weight"])
    torch.testing.assert_close(made.seen[3][2], start["norm.weight"])
    assert not torch.equal(made.seen[2][2], start["norm.weight"])


def test_a_pair_encoder_learns_the_similarities_and_the_embedding_the_logits(table, tmp_path):
    found = data(table)
    made = task(found, pair_epochs=4, embed_epochs=4, lr=1e-3, pair_lr=3e-3)
    losses = {"train/pair_loss": [], "train/loss": []}
    kept = made.log
    made.log = lambda name, value, **more: (
        losses[name].append(value.item()) if name in losses else kept(name, value, **more)
    )
    run = trainer(tmp_path, 8, check_val_every_n_epoch=99)
    run.fit(made, datamodule=found)
    labels = made._labels.sigmoid()
    begun, ended = np.mean(losses["train/loss"][:6]), np.mean(losses["train/loss"][-6:])
    assert ended < 0.5 * begun
    assert labels.min() >= 0
    assert np.mean(losses["train/pair_loss"][-6:]) < np.mean(losses["train/pair_loss"][:6])
    (measured,) = run.validate(made, datamodule=found, verbose=False)
    part = found.part("val")
    with torch.no_grad():
        images = torch.cat([images for images, *_ in found.val_dataloader()])
        embeddings = made.eval()(images)[:, 0]
    expected = [score(embeddings, part, column, name).map for column, name in enumerate(found.attribute_values)]
    assert measured["val/map"] == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_the_command_trains_and_search_takes_the_checkpoint(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("faiss")
    torch.manual_seed(3)
    vit = RerankTask(**MODEL, attributes={"colour": []}, width=16).net
    torch.save(vit.state_dict(), "vit.pth")
    settings = ["--config", "rerank_table", "--model.name", "test_vit", "--model.pretrained", "false"]
    settings += ["--model.model_args", "{img_size: 32, checkpoint_path: vit.pth}", "--model.width", "16"]
    settings += ["--data.root", table, "--data.neighbours", "3", "--data.others", "1"]
    settings += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *settings, "--trainer.max_epochs", "2"]) == 0
    (last,) = Path("runs").rglob("last.ckpt")
    assert main(["fit", *settings, "--trainer.max_epochs", "3", "--checkpoint", str(last)]) == 0
    write_pictures(tmp_path / "pictures")
    visionattn.index("pictures", "index", "test_vit", checkpoint="vit.pth", image_size=32, progress=False)
    hits = visionattn.search("index", "pictures/00_red_bars.png", top=5, rerank=last)
    assert len(hits) == 5
    assert all(0 < hit.score < 1 for hit in hits)
    trained = visionattn.load(last)
    assert any(not torch.equal(value, vit.state_dict()[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 24}, r"model\.width must be divisible by 16; got 24"),
        ({"depth": 0}, r"model\.depth must be 1 or more; got 0"),
        ({"embed_epochs": 0}, r"model\.embed_epochs must be 1 or more; got 0"),
        ({"sched": "cosine"}, r"model\.sched must be 'none', as each phase has its own schedule; got 'cosine'"),
        ({"pair_lr": 0.0}, r"model\.pair_lr must be a finite number above 0; got 0\.0"),
    ],
)
def test_wrong_settings(table, settings, words):
    with pytest.raises(ConfigError, match=words):
        task(data(table), **settings)


def test_too_few_images_and_pairs_are_refused(table):
    with pytest.raises(ConfigError, match=r"data\.neighbours must be below the number of training images, 18; got 18"):
        data(table, neighbours=18).pairs  # noqa: B018
    with pytest.raises(ConfigError, match=r"data\.pairs_per_batch must be at least 1; got 0"):
        data(table, pairs_per_batch=0)


def test_several_devices_are_refused(table):
    made = task(data(table))
    made.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ConfigError, match=r"requires one device: set trainer\.devices to 1"):
        made.on_fit_start()
