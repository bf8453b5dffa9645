"""Training retrieval and re-identification: losses, missing labels, what is learned, resuming, the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("lightning")
pytest.importorskip("pytorch_metric_learning")

from lightning.pytorch import Trainer
from torch import nn

import visionattn
from tests.retrieval_toys import write_table
from visionattn import cli
from visionattn.data.retrieval.catalogue import MISSING
from visionattn.data.retrieval.datamodule import RetrieveData
from visionattn.data.retrieval.embedding import input_config
from visionattn.data.retrieval.pairs import PairData
from visionattn.data.retrieval.triplets import TripletData
from visionattn.data.samplers import IGNORED
from visionattn.errors import CheckpointError, ConfigError
from visionattn.evaluate import evaluate_retrieval
from visionattn.metrics.ranking import means, score_part
from visionattn.predict import ImageIndex
from visionattn.train.cli import main, recipes
from visionattn.train.configuration import argument_names
from visionattn.train.reidentify import ReidentifyTask
from visionattn.train.rerank import RerankTask
from visionattn.train.retrieve import AttributeLoss, RetrieveTask
from visionattn.train.triplets import TripletTask

VALUES = {"colour": ["blue", "green", "red"], "kind": ["bars", "columns", "disc"]}


def task(**settings):
    torch.manual_seed(0)
    return RetrieveTask("toy_conditional", **{"attributes": VALUES, "model_args": {"embed_dim": 8}, **settings})


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).requires_grad_()


def test_triplet_loss_is_its_equation():
    embeddings, labels = unit(14, 2, 5), torch.randint(-1, 3, (14, 2))
    expected = []
    for column in range(2):
        losses = []
        for a in range(14):
            for p in range(14):
                for n in range(14):
                    la, lp, ln = labels[[a, p, n], column]
                    if a != p and la == lp != ln and MISSING not in (la, lp, ln):
                        f = embeddings[:, column]
                        losses.append((0.2 - f[a] @ f[p] + f[a] @ f[n]).clamp(min=0))
        positive = torch.stack([loss for loss in losses if loss > 0])
        expected.append(positive.mean())
    found = AttributeLoss("triplet", "none", 0.2, [3, 3], 5)(embeddings, labels)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_normalized_softmax_is_its_equation():
    compute = AttributeLoss("normalized_softmax", "none", 0.2, [3, 4], 5).double()
    embeddings, labels = unit(14, 2, 5), torch.stack([torch.arange(14) % 3, torch.arange(14) % 4 - 1], dim=1)
    expected = []
    for column, loss in enumerate(compute.losses):
        kept = labels[:, column] != MISSING
        cosines = embeddings[kept, column] @ F.normalize(loss.W, dim=0)
        expected.append(F.cross_entropy(cosines / 0.2, labels[kept, column]))
    torch.testing.assert_close(compute(embeddings, labels), torch.stack(expected).mean())


@pytest.mark.parametrize(
    ("loss", "miner"),
    [
        ("triplet", "none"),
        ("triplet", "semihard"),
        ("triplet", "hard"),
        ("multi_similarity", "multi_similarity"),
        ("multi_similarity", "none"),
        ("proxy_anchor", "none"),
        ("normalized_softmax", "none"),
    ],
)
def test_attributes_of_one_value_give_nothing(loss, miner):
    compute = AttributeLoss(loss, miner, 0.2, [3, 3, 3], 5)
    compute.double()
    embeddings = unit(12, 3, 5)
    labels = torch.stack([torch.arange(12) % 3, torch.ones(12).long(), torch.full((12,), MISSING)], dim=1)
    found = compute(embeddings, labels)
    found.backward()
    assert found > 0
    assert embeddings.grad[:, 0].abs().sum() > 0
    assert embeddings.grad[:, 1:].abs().sum() == 0
    assert all(parameter.grad is not None for parameter in compute.parameters())
    alone = compute(embeddings, labels[:, [1, 1, 2]])
    assert alone.item() == 0


def test_items_without_a_value_do_not_count():
    compute = AttributeLoss("multi_similarity", "none", 0.2, [3], 5)
    embeddings, labels = unit(12, 1, 5), torch.arange(12)[:, None] % 3
    labels[8:] = MISSING
    torch.testing.assert_close(compute(embeddings, labels), compute(embeddings[:8], labels[:8]))


def data(tmp_path, **settings):
    table = tmp_path / "table.csv"
    root = str(table if table.exists() else write_table(tmp_path, copies=6))
    return RetrieveData(root, **{"values_per_batch": 3, "images_per_value": 3, "augmentation": "none", **settings})


def fit(tmp_path, made, epochs, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    found = data(tmp_path, **settings)
    trainer.fit(made, found)
    return trainer, found


def test_it_learns_both_attributes(tmp_path):
    made = task(lr=0.02)
    trainer, found = fit(tmp_path, made, 30)
    measured = trainer.callback_metrics
    assert measured["val/map_colour"] == 1
    assert measured["val/map_kind"] > 0.8
    # The measure is the protocol's, of the network's embeddings in the order of the part.
    part = found.part("val")
    images = torch.stack([found._eval_transform(found.catalogue.images.open(name)) for name in part.images])
    with torch.no_grad():
        scores = score_part(made.eval()(images), part, tuple(VALUES))
    plain, weighted = means(scores)
    assert measured["val/map"].item() == pytest.approx(plain.map, abs=1e-6)
    assert measured["val/map_by_queries"].item() == pytest.approx(weighted.map, abs=1e-6)
    assert measured["val/recall_at_1"].item() == pytest.approx(plain.recall_1, abs=1e-6)
    # `visionattn.load` opens the checkpoint, with its attributes.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = visionattn.load(tmp_path / "last.ckpt")
    assert loaded.attributes == ("colour", "kind")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), made(images))


def test_copies_and_trials_do_not_count(tmp_path):
    made = task()
    found = data(tmp_path)
    part = found.part("val")
    made.trainer = SimpleNamespace(world_size=1, datamodule=found)
    logged = {}
    made.log = lambda name, value, **_: logged.update({name: value})
    vectors = F.normalize(torch.randn(9, 2, 8), dim=-1)
    order = torch.randperm(9)
    made._found = [(vectors[order], order), (torch.randn(2, 2, 8), torch.tensor([IGNORED, IGNORED]))]
    made.on_validation_epoch_end()
    assert logged["val/map_kind"] == pytest.approx(score_part(vectors, part, tuple(VALUES))[1].map)
    logged.clear()
    queries = part.is_query.nonzero()[:, 0]
    made._found = [(vectors[queries], queries)]
    made.on_validation_epoch_end()
    assert logged == {}


def cca_task(**settings):
    torch.manual_seed(0)
    model_args = {"backbone": "test_resnet", "embed_dim": 8, "head": "linear"}
    return RetrieveTask("va_cca", **{"attributes": VALUES, "model_args": model_args, **settings})


@pytest.mark.parametrize("sched", ["constant", "none"])
def test_the_backbone_has_a_learning_rate_of_its_own(tmp_path, sched):
    made = cca_task(backbone_rate=0.1, sched=sched, lr=0.01)
    fit(tmp_path, made, 1)
    rates = {}
    for group in made.optimizers().param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr"], group["weight_decay"]
    for name, parameter in made.named_parameters():
        lr, decay = rates[id(parameter)]
        assert lr == pytest.approx(0.001 if name.startswith("net.backbone.") else 0.01), name
        assert (decay > 0) == (parameter.ndim > 1 and name not in made.no_weight_decay()), name


def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    made = cca_task(backbone_rate=0.0, lr=0.01)
    before = {key: value.clone() for key, value in made.net.state_dict().items()}
    fit(tmp_path, made, 1)
    after = made.net.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed
    assert all(key.startswith("head.") for key in changed), changed


@pytest.mark.parametrize("rate", [-1.0, float("inf")])
def test_rates_of_the_backbone_are_numbers(rate):
    with pytest.raises(ConfigError, match=r"model\.backbone_rate must be a finite number"):
        cca_task(backbone_rate=rate)


def test_reidentification_losses():
    made = reid()
    features, labels = torch.randn(12, made.net.num_features, requires_grad=True), torch.arange(12) % 3
    made.neck.eval()
    expected = F.cross_entropy(made.classifier(made.neck(features)), labels)
    parts = []
    for a in range(12):
        d = (features - features[a]).norm(dim=1)
        positive = max(d[p] for p in range(12) if labels[p] == labels[a] and p != a)
        negative = min(d[n] for n in range(12) if labels[n] != labels[a])
        parts.append(F.softplus(positive - negative))
    found = made.losses(features, labels)
    torch.testing.assert_close(found, expected + torch.stack(parts).mean(), rtol=1e-4, atol=1e-4)
    same = made.losses(features, torch.zeros(12).long())
    assert same.isfinite()
    assert not made.neck.bias.requires_grad


def reid(**settings):
    torch.manual_seed(0)
    return ReidentifyTask("test_resnet", **{"attributes": {"colour": VALUES["colour"]}, **settings})


def test_reidentification_learns(tmp_path):
    made = reid(opt="adamw", lr=0.003, warmup_epochs=0)
    trainer, _ = fit(tmp_path, made, 6, attributes=["colour"], image_size=[24, 24])
    assert trainer.callback_metrics["val/map"] == 1
    assert "val/map_colour" not in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = made.eval().net(images)
        torch.testing.assert_close(visionattn.load(tmp_path / "last.ckpt")(images), expected)


def test_what_the_network_exempts_has_no_decay():
    made = task()
    made.net.no_weight_decay = lambda: {"backbone.weight"}
    assert made.no_weight_decay() == {"net.backbone.weight"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: task(loss="contrastive"), "model.loss must be one of 'triplet', .*; got 'contrastive'"),
        (lambda: task(miner="easy"), "model.miner must be one of 'none', .*; got 'easy'"),
        (lambda: task(loss="proxy_anchor", miner="hard"), "set model.miner to none"),
        (lambda: task(attributes=None), "needs attributes with values"),
        (lambda: RetrieveTask("test_resnet", attributes=VALUES), "does not take one of these arguments"),
        (lambda: reid(attributes=VALUES), "one attribute, the identity"),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_checkpoints_of_others_are_refused(tmp_path):
    made = task()
    saved = {"hyper_parameters": dict(made.hparams), "state_dict": made.state_dict()}
    made.on_load_checkpoint(saved)
    with pytest.raises(CheckpointError, match="trained on the attributes colour, kind; the data have kind, colour"):
        task(attributes=dict(reversed(VALUES.items()))).on_load_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"does not fit the model 'toy_conditional': .* and 1 more"):
        task(model_args={"embed_dim": 4}).on_load_checkpoint(saved)
    with pytest.raises(CheckpointError, match="is for the model 'toy_conditional'"):
        reid().on_load_checkpoint(saved)


RUN = """
model:
  class_path: visionattn.train.retrieve.RetrieveTask
  init_args: {name: toy_conditional, model_args: {embed_dim: 4}, lr: 0.01, loss: proxy_anchor}
data:
  class_path: visionattn.data.retrieval.RetrieveData
  init_args: {root: table.csv, values_per_batch: 2, images_per_value: 2, augmentation: shift}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1, filename: "step{step}", auto_insert_metric_name: false}
"""


def test_the_command_fits_resumes_and_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path, copies=5)
    Path("run.yaml").write_text(RUN)
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert "map by queries" in capsys.readouterr().out
    run = Path("runs/run/version_0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["best"]["monitor"] == "val/map"

    def metrics():
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [[(r["step"], r[key]) for r in rows if r.get(key)] for key in ("train/loss", "val/map", "test/map")]

    before = metrics()
    assert [len(values) for values in before] == [6, 3, 1]
    assert main(["fit", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/step4.ckpt"]) == 0
    assert metrics() == before
    capsys.readouterr()
    words = ["--ckpt_path", f"{run}/checkpoints/best.ckpt", "--data=RetrieveData", "--data.root=table.csv"]
    assert main(["test", *words, "--trainer.accelerator=cpu"]) == 0
    assert f"{float(before[2][0][1]):.4f}" in capsys.readouterr().out
    assert main(["fit", "--config", "run.yaml", "--data.attributes=[cut]"]) == 2
    assert "no attribute cut. There are colour, kind" in capsys.readouterr().err


def test_from_a_backbones_file_to_a_search(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    backbone = timm.create_model("va_halonet_nano_32", num_classes=0)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    settings = {
        "backbone": "va_halonet_nano_32",
        "embed_dim": 16,
        "backbone_checkpoint": str(tmp_path / "backbone.pth"),
    }
    made = RetrieveTask("va_cca", settings, VALUES, miner="semihard", lr=0.0, sched="none")
    for key, value in backbone.state_dict().items():
        assert torch.equal(made.net.backbone.state_dict()[key], value)
    trainer, _ = fit(tmp_path, made, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    # A checkpoint does not need what its training began with.
    (tmp_path / "backbone.pth").unlink()
    assert cli.main(["evaluate", "retrieval", "last.ckpt", "--data", "table.csv", "--matrix", "matrix.png"]) == 0
    assert cli.main(["index", "images", "index", "--model", "last.ckpt"]) == 0
    assert cli.main(["search", "index", "images/003.png", "--attribute", "kind", "--include-query"]) == 0
    assert "003.png" in capsys.readouterr().out


def test_evaluate_index_and_search_prepare_images_as_training_did(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    made = RetrieveTask("va_cca", {"backbone": "test_resnet", "embed_dim": 16, "head": "linear"}, VALUES, lr=0.01)
    made.net.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "interpolation": "nearest"}
    trainer, found = fit(tmp_path, made, 3, image_size=[16, 16])
    assert made.input_config["size"] != [16, 16]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    measured = trainer.callback_metrics
    loaded = visionattn.load("last.ckpt")
    config = {"size": [16, 16], "mean": [0.1, 0.2, 0.3], "std": made.input_config["std"], "interpolation": "nearest"}
    assert input_config(loaded) == config
    rows = evaluate_retrieval("last.ckpt", "table.csv", split="val").own("last.ckpt")
    assert [row.map for row in rows] == pytest.approx([measured[f"val/map_{name}"].item() for name in VALUES], abs=1e-6)
    assert cli.main(["index", "images", "index", "--model", "last.ckpt"]) == 0
    assert cli.main(["search", "index", "images/003.png", "--attribute", "kind", "--include-query"]) == 0
    index = ImageIndex("index")
    assert index.manifest["input"] == config
    image = found.catalogue.images.open("003.png")
    with torch.no_grad():
        expected = made.eval()(found._eval_transform(image)[None])[0].numpy()
    assert index.embed(loaded, image) == pytest.approx(expected, abs=1e-6)
    with open("search.json") as file:
        first = json.load(file)["hits"][0]
    assert (first["image"], first["score"]) == ("003.png", pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("retrieve/")])
def test_recipes_say_what_their_classes_take(name):
    recipe = yaml.safe_load(recipes()[name].read_text())
    tasks, sets = (RetrieveTask, ReidentifyTask, TripletTask, RerankTask), (RetrieveData, TripletData, PairData)
    for part, known in (("model", tasks), ("data", sets)):
        (made,) = [one for one in known if recipe[part]["class_path"].endswith(f".{one.__name__}")]
        arguments = argument_names(made)
        assert set(recipe[part]["init_args"]) <= set(arguments)


def test_a_model_without_conditions_is_refused():
    class Plain(nn.Module):
        pass

    with pytest.raises(ConfigError, match="embeds images by attributes"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("visionattn.train.retrieve.create", lambda *args, **kwargs: Plain())
            task()
