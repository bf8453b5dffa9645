"""Training on given triplets: the loss, what is learned and judged, resuming, the command line."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer

import visionattn
from tests.retrieval_toys import TOY_CONDITIONS, write_triplets
from visionattn.data.retrieval.triplets import TripletData
from visionattn.data.samplers import IGNORED
from visionattn.errors import CheckpointError, ConfigError
from visionattn.evaluate import triplets
from visionattn.train.cli import main
from visionattn.train.triplets import TripletTask

CONDITIONS = {name: [] for name in TOY_CONDITIONS}


def task(**settings):
    torch.manual_seed(0)
    return TripletTask("toy_conditional", **{"attributes": CONDITIONS, "model_args": {"embed_dim": 8}, **settings})


def step(made, batch):
    """The loss of a batch, without a trainer."""
    made.trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 0.0}])])
    made.log = lambda *args, **kwargs: None
    return made.training_step(batch, 0)


def test_the_loss_is_its_equation_in_the_space_of_the_condition():
    made = task(margin=0.3).double()
    images = torch.randn(18, 3, 24, 24, dtype=torch.float64)
    conditions = torch.tensor([0, 3, 1, 2, 2, 0])
    expected = []
    for row, condition in zip(images.split(3), conditions.tolist(), strict=True):
        anchor, far, near = made.net(row)[:, condition].float()
        near_by, far_by = 1 - F.cosine_similarity(anchor, near, dim=0), 1 - F.cosine_similarity(anchor, far, dim=0)
        expected.append((near_by - far_by + 0.3).clamp(min=0))
    loss = step(made, (images, conditions))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    # Spaces that no row asked for learn nothing, but have a gradient, as DDP asks.
    made.zero_grad()
    step(made, (images[:3], conditions[:1])).backward()
    assert [head.weight.grad.abs().sum().item() > 0 for head in made.net.heads] == [True, False, False, False]


def test_a_margin_that_is_kept_costs_nothing():
    made = task()
    made.forward = lambda images: F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), dim=-1)[:, None]
    assert step(made, (torch.zeros(3, 3, 24, 24), torch.tensor([0]))) == 0
    far, near = 0.0, 1 / math.sqrt(1.01)
    made.loss.margin = 1.5
    assert step(made, (torch.zeros(3, 3, 24, 24), torch.tensor([0]))).item() == pytest.approx(1.5 - near + far)


class Losses(Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(outputs["loss"].item())


def test_it_learns_all_conditions(tmp_path):
    root, losses = write_triplets(tmp_path, each=24), Losses()
    made = task(lr=0.02)
    found = TripletData(str(root), triplets_per_batch=24, augmentation="none")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=12,
        callbacks=[losses],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(made, found)
    assert sum(losses.found[-4:]) < 0.2 * sum(losses.found[:4])
    measured = dict(trainer.callback_metrics)
    assert measured["val/triplet_accuracy"] > 0.95
    # The measure is that of `visionattn evaluate retrieval`, of the checkpoint, and the mean is over conditions.
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = visionattn.load(tmp_path / "last.ckpt")
    assert loaded.attributes == tuple(TOY_CONDITIONS)
    ((_, shares),) = triplets(loaded, root, part="val").items()
    for name in TOY_CONDITIONS:
        assert measured[f"val/triplet_accuracy_{name}"].item() == pytest.approx(shares[name])
    mean = sum(shares[name] for name in TOY_CONDITIONS) / 4
    assert measured["val/triplet_accuracy"].item() == pytest.approx(mean)


def test_copies_trials_and_absent_conditions_do_not_count(tmp_path):
    made, found = task(), TripletData(str(write_triplets(tmp_path)))
    part = found.part("val")
    # Three triplets of the first condition, one of the second: the mean over conditions is not that over triplets.
    kept = torch.tensor([0, 1, 2, 12])
    part = part._replace(**{name: getattr(part, name)[kept] for name in ("anchors", "far", "near", "condition")})
    found._parts["val"] = part
    made.trainer = SimpleNamespace(world_size=1, datamodule=found)
    logged = {}
    made.log = lambda name, value, **_: logged.update({name: value})
    vectors = F.normalize(torch.randn(len(part.names), 4, 8), dim=-1)
    order = torch.randperm(len(part.names))
    made._found = [(vectors[order], order), (torch.randn(2, 4, 8), torch.tensor([IGNORED, IGNORED]))]
    made.on_validation_epoch_end()
    right = []
    for a, f, n, c in zip(*(own.tolist() for own in part[3:])):
        right.append(float(vectors[a, c] @ vectors[n, c] > vectors[a, c] @ vectors[f, c]))
    shares = [sum(right[:3]) / 3, right[3]]
    assert logged == {
        "val/triplet_accuracy_class": pytest.approx(shares[0]),
        "val/triplet_accuracy_closure": pytest.approx(shares[1]),
        "val/triplet_accuracy": pytest.approx(sum(shares) / 2),
    }
    logged.clear()
    made._found = [(vectors[:1], torch.tensor([0]))]
    made.on_validation_epoch_end()
    assert logged == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: task(attributes=None), "follow from TripletData"),
        (lambda: task(margin=0.0), r"model\.margin must be above 0"),
        (lambda: task(sched="cosinus"), "model.sched must be one of .*; got 'cosinus'"),
        (lambda: TripletTask("test_resnet", attributes=CONDITIONS), "does not take one of these arguments"),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_checkpoints_of_others_are_refused():
    made = task()
    saved = {"hyper_parameters": dict(made.hparams), "state_dict": made.state_dict()}
    made.on_load_checkpoint(saved)
    with pytest.raises(
        CheckpointError, match=r"on the attributes class, closure, gender and 1 more; the data have heel"
    ):
        task(attributes=dict(reversed(CONDITIONS.items()))).on_load_checkpoint(saved)


RUN = """
model:
  class_path: visionattn.train.triplets.TripletTask
  init_args: {name: toy_conditional, model_args: {embed_dim: 4}, lr: 0.01}
data:
  class_path: visionattn.data.retrieval.TripletData
  init_args: {root: toys, triplets_per_batch: 8, augmentation: shift}
trainer:
  accelerator: cpu
  max_epochs: 3
  limit_train_batches: 4
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1, filename: "step{step}", auto_insert_metric_name: false}
"""


def test_the_command_fits_resumes_exactly_and_tests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_triplets(tmp_path / "toys")
    Path("run.yaml").write_text(RUN)
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert "triplet accuracy heel" in capsys.readouterr().out
    run = Path("runs/run/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["best"]["monitor"] == "val/triplet_accuracy"

    def metrics():
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        keys = ("train/loss", "val/triplet_accuracy", "test/triplet_accuracy")
        return [[(row["step"], row[key]) for row in rows if row.get(key)] for key in keys]

    before = metrics()
    assert [len(values) for values in before] == [12, 4, 1]
    assert len({loss for _, loss in before[0]}) == 12
    # Inside an epoch, and at the end of one, where `limit_train_batches` has left some triplets over.
    for number in (6, 4):
        checkpoint = f"{run}/checkpoints/step{number}.ckpt"
        assert main(["fit", "--config", f"{run}/config.yaml", "--ckpt_path", checkpoint]) == 0
        assert metrics() == before
    capsys.readouterr()
    words = ["--ckpt_path", f"{run}/checkpoints/best.ckpt", "--data=TripletData", "--data.root=toys"]
    assert main(["test", *words, "--trainer.accelerator=cpu"]) == 0
    assert f"{float(before[2][0][1]):.4f}" in capsys.readouterr().out
    Path("toys/tripletlists/heel_tripletlist_train.txt").write_text("0 1\n")
    assert main(["fit", "--config", "run.yaml"]) == 2
    assert "heel_tripletlist_train.txt has the invalid line '0 1'" in capsys.readouterr().err
