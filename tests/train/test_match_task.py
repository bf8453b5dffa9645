"""Stereo and flow training: each term of the loss, masks, metrics, learning, exact resuming, the command line."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Trainer

import visionattn
from visionattn.blocks.match_decoder import exchange_views
from visionattn.data.matching.datamodule import MatchData
from visionattn.data.samplers import IGNORED
from visionattn.errors import CheckpointError, ConfigError
from visionattn.metrics.matching import disparity_errors
from visionattn.models.match_stereo import MatchFields
from visionattn.train.cli import main
from visionattn.train.stereo import MatchTask, coarse_truth, masked_mean, robust, start_loss, there_and_back

SMALL = {"widths": [16, 16, 32, 32], "encoder_depths": [1, 1, 1, 1], "depths": [1, 1, 1, 1]}


def task(name="va_match_stereo_nano", **settings):
    torch.manual_seed(0)
    return MatchTask(name, **{"model_args": SMALL, **settings})


def detached(match):
    """The task outside of a trainer's loop, with what it logs."""
    match.trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    match.trainer.strategy.optimizers = [torch.optim.SGD(match.parameters(), 0.1)]
    match.logged = {}
    match.log = lambda name, value, **_: match.logged.update({name: value})
    match.log_dict = match.logged.update
    return match


def test_coarse_truth_lies_on_a_surface():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (2, 8, 12, 2)).astype(np.float32) + np.float32([10, 0])
    truth[:, :3, 5:] += np.float32([90, 0])  # an outline through blocks
    truth[0, 4:, :4] = np.nan
    truth[1, 0, 0] = np.nan
    seen = rng.uniform(size=(2, 8, 12)) < 0.6
    found, shown = coarse_truth(torch.from_numpy(truth), torch.from_numpy(seen), 4)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                block = truth[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1, 2)
                kept = seen[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].ravel()[np.isfinite(block[:, 0])]
                block = block[np.isfinite(block[:, 0])]
                if not len(block):
                    assert found[b, i, j].isnan().all()
                    assert not shown[b, i, j]
                    continue
                middle = np.sort(block, axis=0)[(len(block) - 1) // 2]
                near = (np.abs(block - middle) <= 4).all(1)
                np.testing.assert_allclose(found[b, i, j], block[near].mean(0) / 4, rtol=1e-5)
                assert shown[b, i, j] == (kept[near].mean() > 0.5)
    # Of near and far pixels the mean is of one kind.
    assert not ((found[..., 0] > 3.5) & (found[..., 0] < 22)).any()


def test_there_and_back():
    field = torch.zeros(2, 6, 20, 2)
    field[0, ..., 0], field[1, ..., 0] = -3.25, 3.25
    assert there_and_back(field).abs().max() < 1e-5
    field[1, ..., 0] = 5.25
    assert there_and_back(field)[..., 0] == pytest.approx(torch.full((2, 6, 20), 2.0).numpy(), abs=1e-5)
    field = field.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: there_and_back(f * 1.01), field[:, :3, :6].detach().requires_grad_())


def test_start_loss_is_the_entropy_of_the_two_nearest_disparities():
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 6, 6, generator=rng).softmax(-1)
    truth = torch.rand(2, 3, 6, 2, generator=rng) * 5
    truth[0, ..., 0] *= -1
    known = torch.rand(2, 3, 6, generator=rng) < 0.7
    truth[~known] = math.nan
    expected = []
    for v, y, x in known.nonzero().tolist():
        d = abs(truth[v, y, x, 0].item())
        low = math.floor(d)
        expected.append(-(1 - d + low) * p[v, y, x, low].log() - (d - low) * p[v, y, x, min(low + 1, 5)].log())
    assert start_loss(p, truth, known, flow=False).item() == pytest.approx(
        torch.stack(expected).mean().item(), rel=1e-5
    )

    p = torch.rand(2, 6, 6, generator=rng).softmax(-1)  # maps of 2 x 3
    truth = torch.zeros(2, 2, 3, 2)
    truth[0, 0, 0] = torch.tensor([1.25, 0.5])
    known = torch.zeros(2, 2, 3, dtype=torch.bool)
    known[0, 0, 0] = True
    shares = {1: 0.75 * 0.5, 2: 0.25 * 0.5, 4: 0.75 * 0.5, 5: 0.25 * 0.5}
    expected = -sum(share * p[0, 0, place].log() for place, share in shares.items())
    assert start_loss(p, truth, known, flow=True).item() == pytest.approx(expected.item(), rel=1e-5)


def made_fields(rng, size=(32, 64)):
    """A pass with one layer a scale, as random fields."""

    def field(stride):
        return torch.randn(2, size[0] // stride, size[1] // stride, 2, generator=rng)

    probability = torch.rand(2, size[0] // 32, size[1] // 32, size[1] // 32, generator=rng).softmax(-1)
    strides = (32, 16, 8, 4)
    layers = [[field(stride) for stride in strides] for _ in range(2)]
    return MatchFields(field(1), field(32), probability, *layers, [field(stride) for stride in strides[1:]])


def random_truth(rng, size=(32, 64)):
    truth = 3 * torch.rand(2, *size, 2, generator=rng) * torch.tensor([1.0, 0.0])
    truth[0] *= -1
    truth[:, 5:9, 7:30] = math.nan
    seen = (torch.rand(2, *size, generator=rng) < 0.7) & truth[..., 0].isfinite()
    return truth, seen


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_what_the_module_says(masked):
    rng = torch.Generator().manual_seed(0)
    found, (truth, seen) = made_fields(rng), random_truth(rng)
    terms = task(mask_occluded=masked).losses(found, truth, seen)
    order = []
    for scale in range(4):
        order += [(found.upsampled[scale - 1], False)] if scale else []
        order += [(found.after_self[scale], False), (found.after_cross[scale], masked)]
    total = weight = 0.0
    for number, (field, only_seen) in enumerate(order):
        wanted, shown = coarse_truth(truth, seen, 64 // field.shape[2])
        error = ((field - wanted).square().sum(-1) + 0.01).sqrt() - 0.1
        mask = wanted[..., 0].isfinite() & (shown if only_seen else True)
        total += 0.9 ** (len(order) - 1 - number) * error[mask].mean().item()
        weight += 0.9 ** (len(order) - 1 - number)
    assert terms["sequence"].item() == pytest.approx(total / weight, rel=1e-5)
    known = truth[..., 0].isfinite()
    full = robust((found.field - truth)[known] / 4).mean()
    assert terms["full"].item() == pytest.approx(full.item(), rel=1e-5)


def test_occluded_pixels_do_not_reach_cross_fields():
    rng = torch.Generator().manual_seed(0)
    found, (truth, _) = made_fields(rng), random_truth(rng)
    unseen = torch.zeros(2, 32, 64, dtype=torch.bool)
    for masked in (True, False):
        fields = [field.clone().requires_grad_() for field in (*found.after_self, *found.after_cross)]
        one = found._replace(after_self=fields[:4], after_cross=fields[4:])
        task(mask_occluded=masked).losses(one, truth, unseen)["sequence"].backward()
        reached = [field.grad.abs().sum() > 0 for field in fields]
        assert reached == [True] * 4 + [not masked] * 4


def test_consistency_looks_at_pixels_that_both_see():
    rng = torch.Generator().manual_seed(0)
    found, (truth, seen) = made_fields(rng), random_truth(rng)
    field = torch.zeros(2, 32, 64, 2)
    field[0, ..., 0], field[1, ..., 0] = -4.0, 5.0
    field[:, :16, :, 0] *= torch.tensor([1.0, 3.0])[:, None, None]  # the upper half does not agree
    loss = task().losses(found._replace(field=field), truth, seen)["both"]
    assert loss.item() == pytest.approx(math.sqrt(0.25**2 + 0.01) - 0.1, rel=0.02)
    hidden = torch.zeros_like(seen)
    full = truth.nan_to_num()
    assert task().losses(found._replace(field=field), full, hidden)["both"].item() == 0


def test_weights_add_up_and_sparse_truth_gives_finite_gradients():
    match = detached(task(consistency=0.3, start=0.7))
    data = MatchData(crop_size=(192, 192), epoch_pairs=2, batch_size=2, max_disparity=40)
    data.setup("fit")
    views, fields, seen, numbers = next(iter(data.train_dataloader()))
    fields[torch.rand(fields.shape[:-1]) < 0.98] = math.nan
    fields[1, 1] = math.nan  # a view without truth
    seen &= fields[..., 0].isfinite()
    loss = match.training_step((views, fields, seen, numbers), 0)
    terms = {name: match.logged[f"train/{name}"] for name in ("sequence", "full", "both", "start")}
    expected = terms["sequence"] + terms["full"] + 0.3 * terms["both"] + 0.7 * terms["start"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert match.logged["train/loss"] == loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in match.net.parameters() if p.grad is not None)
    nothing = torch.full_like(fields, math.nan)
    assert match.training_step((views, nothing, torch.zeros_like(seen), numbers), 0).isfinite()


def test_masked_mean():
    values = torch.tensor([1.0, math.nan, 5.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    mean = masked_mean(values, mask)
    mean.backward()
    assert mean.item() == 3
    assert values.grad.tolist() == [0.5, 0, 0.5]
    assert masked_mean(values, ~mask & False).item() == 0


def test_validation_is_the_protocol():
    match = detached(task())
    data = MatchData(crop_size=(192, 192), val_pairs=3, batch_size=2, max_disparity=40)
    data.setup("validate")
    expected = []
    for views, fields, seen, numbers in data.val_dataloader():
        with torch.no_grad():
            disparity = match.net(views[:, 0] / 255, views[:, 1] / 255)[:, 0].numpy()
        expected += [
            asdict(disparity_errors(one, -truth[0, ..., 0].numpy(), mask[0].numpy()))
            for one, truth, mask in zip(disparity, fields, seen)
        ]
        with torch.no_grad():
            match.validation_step((views, fields, seen, numbers), 0)
            match.validation_step((views, fields, seen, torch.full_like(numbers, IGNORED)), 0)
    assert len(expected) == 3
    for measure in ("epe", "bad_0_5", "bad_1", "bad_2", "bad_4", "d1"):
        mean = np.mean([errors[measure] for errors in expected])
        assert match.val_errors[f"nonocc_{measure}"].compute().item() == pytest.approx(mean, rel=1e-4)
    match.on_validation_epoch_end()
    assert match.logged["val/within_2"].item() == pytest.approx(100 - match.val_errors["all_bad_2"].compute().item())
    assert {"val/epe", "val/d1", "val/nonocc_bad_4"} <= match.logged.keys()


def test_44_steps_lower_the_loss(tmp_path):
    match = task(lr=4e-3, sched="none")
    data = MatchData(crop_size=(192, 192), epoch_pairs=44, val_pairs=4, batch_size=1, max_disparity=32, rectification=0)
    losses, errors = [], []
    log = match.log

    def keep(name, value, **kwargs):
        if name in ("train/loss", "val/epe"):
            (losses if name == "train/loss" else errors).append(float(value.compute() if name == "val/epe" else value))
        log(name, value, **kwargs)

    match.log = keep
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    # Measured before and between, in one mode: tensors of inference cannot go on in training.
    settings |= {"inference_mode": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_epochs=1, gradient_clip_val=1.0, **settings)
    trainer.validate(match, data, verbose=False)
    trainer.fit(match, data)
    assert len(losses) == 44
    before, after = np.mean(losses[:4]), np.mean(losses[-8:])
    assert after < before / 2
    assert errors[-1] < errors[0] / 4


def test_nothing_is_asked_of_the_border():
    wide, plain = (task(model_args={**SMALL, "border": border}) for border in (32, 0))
    plain.load_state_dict(wide.state_dict())
    views, truth, seen = torch.rand(1, 2, 3, 192, 192), 9 * torch.randn(2, 192, 192, 2), torch.rand(2, 192, 192) < 0.8
    with torch.no_grad():
        found = wide.losses(wide(views), truth, seen)
        extended = plain(torch.nn.functional.pad(views, (32, 32, 0, 0, 0, 0), mode="replicate"))
        nothing = torch.full((2, 192, 32, 2), torch.nan)
        unseen = torch.zeros(2, 192, 32, dtype=torch.bool)
        expected = plain.losses(extended, torch.cat([nothing, truth, nothing], 2), torch.cat([unseen, seen, unseen], 2))
    for term in ("sequence", "full", "start"):
        assert found[term].item() == pytest.approx(expected[term].item(), rel=1e-5)


def test_flow_and_bfloat16_train():
    for name, flow in (("va_match_stereo_nano", False), ("va_match_flow_tiny", True)):
        match = detached(task(name, grad_checkpointing=True))
        data = MatchData(flow=flow, crop_size=(192, 192), epoch_pairs=1, batch_size=1, max_disparity=30)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        exact = match.training_step(batch, 0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = match.training_step(batch, 0)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=0.02)
        assert all(p.grad.isfinite().all() for p in match.net.parameters() if p.grad is not None)
        if flow:
            with torch.no_grad():
                match.validation_step(batch, 0)
            assert match.val_errors["all_epe"].compute() > 0


RECIPE = """
model:
  class_path: visionattn.train.stereo.MatchTask
  init_args:
    name: va_match_stereo_nano
    model_args: {widths: [8, 8, 8, 8], encoder_depths: [1, 1, 1, 1], depths: [1, 1, 1, 1]}
data:
  class_path: visionattn.data.matching.MatchData
  init_args: {crop_size: [192, 192], epoch_pairs: 3, val_pairs: 1, batch_size: 1, max_disparity: 32}
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - {class_path: EMAWeightAveraging, init_args: {decay: 0.8}}
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1, filename: "step{step}", auto_insert_metric_name: false}
"""


def metrics(folder, column):
    with open(folder / "metrics.csv", newline="") as file:
        return [(row["step"], row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_the_command_fits_resumes_and_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "small.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "within 2" in shown
    assert "multiply-accumulates" in shown
    run = Path("runs/small/version_0")
    columns = ("train/loss", "train/lr", "val/epe", "val/nonocc_bad_2", "test/epe")
    before = {column: metrics(run, column) for column in columns}
    assert [len(rows) for rows in before.values()] == [6, 6, 3, 3, 1]
    # Stopped inside the second epoch and resumed, all is as if it had not been.
    assert main(["fit", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/step4.ckpt"]) == 0
    assert {column: metrics(run, column) for column in columns} == before
    best = run / "checkpoints/best.ckpt"
    assert visionattn.load(best).task == "stereo"
    with pytest.raises(CheckpointError, match="not for the model 'va_match_stereo_tiny'"):
        task("va_match_stereo_tiny").on_load_checkpoint(torch.load(best, weights_only=True))
    with pytest.raises(CheckpointError, match=r"does not fit the model .* and \d+ more"):
        task().on_load_checkpoint(torch.load(best, weights_only=True))


def test_the_recipe_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "stereo_nano", "--data.flow=true"]) == 2
    assert capsys.readouterr().err == "visionattn: The model is for stereo, but data.flow is True.\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "va_span_ch26_x2", "model_args": {}}, "must be a model of the task 'stereo' or 'flow'"),
        ({"consistency": -1.0}, "must be at least 0"),
        ({"sched": "cosin"}, "model.sched must be one of .*; got 'cosin'"),
        ({"model_args": {"depth": 3}}, "does not take one of these arguments"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        task(**settings)


def test_views_are_stacked_as_the_model_has_them():
    data = MatchData(crop_size=(192, 192), epoch_pairs=2, batch_size=2, max_disparity=40)
    data.setup("fit")
    _, fields, _, _ = next(iter(data.train_dataloader()))
    stacked = fields.transpose(0, 1).flatten(0, 1)
    assert (stacked[:2, ..., 0] <= 0).all()
    assert (exchange_views(stacked)[:2, ..., 0] >= 0).all()
