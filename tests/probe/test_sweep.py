import math

import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import nn

from tests.probe.arrays import ArrayFeatures, clustered
from tests.probe.stores import store
from visionattn.errors import DataError, InputError, UnknownNameError
from visionattn.probe.heads import training as head_training
from visionattn.probe.heads.banks import HeadSpec, grid, group_logits
from visionattn.probe.heads.poolings import create_pooling
from visionattn.probe.heads.poolings.learned_query import PatchProbing, TokenProbing
from visionattn.probe.heads.poolings.own_weights import ClassToken, Mean, SimPool
from visionattn.probe.statistics import calibration_error
from visionattn.probe.sweep import hold_out, sweep
from visionattn.probe.tokens.interface import Features

SHORT = {"epochs": 3, "batch_size": 32, "warmup_epochs": 1}


def double(count=150, **options):
    return clustered(count, noise=3.0, dtype=torch.float64, **options)


def without_time(result):
    return [{name: value for name, value in row.items() if name != "sweep_seconds"} for row in result.rows()]


def same(a, b):
    """Rows whose missing numbers are NaN."""
    return repr(a) == repr(b)


def trained_by_hand(train, spec, rows, epochs, batch_size, warmup_epochs, order_of):
    """One head, its optimiser written out."""
    dim, classes = train.layers[0].dim, len(train.classes)
    torch.manual_seed(spec.seed)
    pooling = create_pooling(spec.pooling, dim, train.layers[0].grid)
    weight = nn.init.trunc_normal_(nn.Linear(pooling.out_dim, classes).weight, std=0.01).detach()
    pooling.double()
    parameters = [*pooling.parameters(), nn.Parameter(weight.double()), nn.Parameter(torch.zeros(classes).double())]
    mean, variance = torch.zeros(pooling.out_dim).double(), torch.ones(pooling.out_dim).double()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    steps, step = len(rows) // batch_size, 0
    for epoch in range(epochs):
        for part in order_of[epoch]:
            y = pooling(train.patches[0][part])
            mean = 0.9 * mean + 0.1 * y.detach().mean(0)
            variance = 0.9 * variance + 0.1 * y.detach().var(0)
            y = (y - y.mean(0)) / (y.var(0, correction=0) + 1e-6).sqrt()
            loss = -(y @ parameters[-2].T + parameters[-1]).log_softmax(1)[range(len(part)), train.labels[part]].mean()
            gradients = torch.autograd.grad(loss, parameters)
            at = step / steps
            factor = at / warmup_epochs
            if at >= warmup_epochs:
                factor = (1 + math.cos(math.pi * (at - warmup_epochs) / (epochs - warmup_epochs))) / 2
            step += 1
            for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
                decay = spec.weight_decay if p.ndim > 1 else 0
                if spec.optimizer == "lars":
                    lr = spec.lr * batch_size / 256 * factor
                    trust = 0.001 * p.norm() / (g.norm() + decay * p.norm() + 1e-8) if p.ndim > 1 else 1
                    first.copy_(0.9 * first + trust * (g + decay * p.detach()))
                    p.data -= lr * first
                else:
                    lr = spec.lr * factor
                    first.copy_(0.9 * first + 0.1 * g)
                    second.copy_(0.999 * second + 0.001 * g * g)
                    p.data *= 1 - lr * decay
                    p.data -= lr * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return [*parameters, mean, variance]


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec("gap", lr=20.0),
        HeadSpec("gap", lr=20.0, weight_decay=0.3, seed=3),
        HeadSpec("ep_4", lr=20.0),
        HeadSpec("ep_4", optimizer="adamw", lr=0.01, weight_decay=0.1),
    ],
    ids=str,
)
def test_a_head_equals_a_loop_written_out(spec):
    train, test = double(), double(30, seed=1)
    result = sweep(train, test, [spec], holdout=0, seed=5, **SHORT)
    reads = [part for part in train.read if len(part) == 32]
    orders = [reads[4 * epoch : 4 * (epoch + 1)] for epoch in range(3)]
    assert all(len(torch.cat(order).unique()) == 128 for order in orders)
    head = result.heads[0].head
    found = [*head.pooling.parameters(), *head.classifier.parameters(), head.norm.running_mean, head.norm.running_var]
    expected = trained_by_hand(train, spec, torch.arange(150), 3, 32, 1, orders)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-7, atol=1e-9)


MANY = [
    *grid(["gap", "cls"], lrs=[5.0, 20.0], layers=[0, 1]),
    *grid(["ep_2", "ep_8", "ep_all_4"], lrs=[5.0, 20.0], seeds=[0, 1]),
    *grid(["ep_2", "gap"], optimizers=["adamw"], lrs=[0.01], weight_decays=[0.0, 0.1]),
    HeadSpec("aim", lr=5.0),
    HeadSpec("simpool", optimizer="adamw", lr=0.001),
    HeadSpec("cbam", optimizer="adamw", lr=0.001),
]


def test_a_head_trains_alone_as_among_others():
    train, test = double(layers=2), double(30, layers=2, seed=1)
    together = sweep(train, test, MANY, **SHORT)
    read = [part.tolist() for part in train.read]
    for number in (0, 3, 5, 9, 11, 14, 19, 22, 24, 25, 26):
        train.read.clear()
        alone = sweep(train, test, [MANY[number]], **SHORT).heads[0]
        assert [part.tolist() for part in train.read] == read  # each batch once, in the same order
        other = together.heads[number]
        assert alone.held_out == other.held_out
        assert alone.best_epoch == other.best_epoch
        for name, value in alone.head.state_dict().items():
            torch.testing.assert_close(value, other.head.state_dict()[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(alone.last.nll, other.last.nll, rtol=1e-5, atol=1e-7)


def test_queries_need_not_fit_one_call(monkeypatch):
    train, test, heads = double(), double(30, seed=1), grid(["ep_2", "ep_4"], lrs=[5.0, 10.0, 20.0])
    whole = sweep(train, test, heads, **SHORT)
    monkeypatch.setattr("visionattn.probe.heads.banks._AVERAGES_ON_CPU", 5 * 32 * 16)
    parts = sweep(train, test, heads, **SHORT)
    for one, other in zip(whole.heads, parts.heads, strict=True):
        torch.testing.assert_close(one.last.nll, other.last.nll, rtol=1e-7, atol=1e-9)


def test_the_held_out_images_choose_and_the_test_images_do_not():
    train, test = clustered(150, noise=3.0), clustered(60, noise=3.0, seed=1)
    heads = grid(["gap", "ep_4"], lrs=[0.01, 1.0, 30.0])
    result = sweep(train, test, heads, **SHORT)
    test.labels = test.labels.flip(0)
    other = sweep(train, test, heads, **SHORT)
    assert [head.spec for head in result.chosen] == [head.spec for head in other.chosen]
    for first in (0, 3):
        group = result.heads[first : first + 3]
        best = max(head.held_out_accuracy for head in group)
        assert result.chosen[first // 3] is next(head for head in group if head.held_out_accuracy == best)
    for head in result.heads:
        assert len(head.held_out) == 3
        assert head.best_epoch == 1 + head.held_out.index(max(head.held_out))
        logits = head.head(test.patches[0])
        assert torch.equal(logits.argmax(1), head.best.predictions)
        torch.testing.assert_close(logits.softmax(1).amax(1), head.best.confidences)
        torch.testing.assert_close(-logits.log_softmax(1).gather(1, test.labels.flip(0)[:, None])[:, 0], head.best.nll)
        held = hold_out(train.labels, torch.arange(150), 0.1, 0)[1]
        accuracy = float((head.head(train.patches[0][held]).argmax(1) == train.labels[held]).double().mean())
        assert accuracy == pytest.approx(head.held_out_accuracy)


def test_rows():
    train, test = clustered(150, noise=3.0), clustered(60, noise=3.0, seed=1)
    result = sweep(train, test, grid(["gap", "ep_4"], lrs=[1.0, 30.0]), **SHORT)
    rows = result.rows()
    assert [row["chosen"] for row in rows].count(True) == 2
    head, row = result.heads[2], rows[2]
    assert (row["pooling_parameters"], row["classifier_parameters"]) == (16 * 16 + 4 * 16, 3 * 16 + 3)
    assert (row["pooling"], row["layer"], row["epochs"]) == ("ep_4", "layer 0", 3)
    assert row["test_best"] == float((head.best.predictions == test.labels).double().mean())
    assert row["test_best_low"] < row["test_best"] < row["test_best_high"]
    assert row["calibration_error"] == calibration_error(head.best.confidences, head.best.correct)
    assert row["nll"] == pytest.approx(float(head.best.nll.mean()))
    assert row["sweep_seconds"] == result.seconds > 0
    assert same(without_time(result), without_time(sweep(train, test, grid(["gap", "ep_4"], lrs=[1.0, 30.0]), **SHORT)))


def test_refit_trains_the_chosen_on_all_images_and_tests_them_once(tmp_path):
    train, test = double(), double(60, seed=1)
    heads = grid(["gap", "ep_4"], lrs=[1.0, 30.0])
    result = sweep(train, test, heads, refit=True, state=tmp_path / "sweep.pt", **SHORT)
    plain = sweep(train, test, heads, **SHORT)
    assert [head.spec for head in result.chosen] == [head.spec for head in plain.chosen]
    whole = sweep(train, test, [head.spec for head in plain.chosen], holdout=0, **SHORT)
    for head, expected in zip(result.chosen, whole.heads, strict=True):
        assert head.refit
        assert head.best_epoch == 3
        assert torch.equal(head.best.confidences, expected.last.confidences)
    assert [row["refit"] for row in result.rows()] == [False] * 4 + [True] * 2
    assert {file.name for file in tmp_path.iterdir()} == {"sweep.pt", "sweep-refit.pt"}


@pytest.mark.parametrize("batches", [3, 9, 16, 17])
def test_a_killed_sweep_ends_with_the_same_table(tmp_path, batches):
    state = tmp_path / "state.pt"
    heads = [*grid(["gap", "ep_4"], lrs=[1.0, 30.0]), HeadSpec("aim", optimizer="adamw", lr=0.01, weight_decay=0.1)]
    train, test = clustered(150, noise=3.0), clustered(60, noise=3.0, seed=1)
    expected = sweep(train, test, heads, refit=True, **SHORT)
    assert len(train.read) > batches
    train.read.clear()
    train.stop_after = batches
    with pytest.raises(KeyboardInterrupt):
        sweep(train, test, heads, refit=True, state=state, **SHORT)
    train.stop_after = None
    train.read.clear()
    result = sweep(train, test, heads, refit=True, state=state, **SHORT)
    assert same(without_time(result), without_time(expected))
    for one, other in zip(result.heads + result.chosen, expected.heads + expected.chosen, strict=True):
        assert torch.equal(one.best.confidences, other.best.confidences)
    train.read.clear()
    again = sweep(train, test, heads, refit=True, state=state, **SHORT)
    assert len(train.read) == 2  # a look at one image for each training: nothing was trained
    assert again.rows() == result.rows()


def test_a_state_of_something_else(tmp_path):
    state = tmp_path / "state.pt"
    train, test = clustered(150), clustered(60, seed=1)
    sweep(train, test, [HeadSpec("gap")], state=state, **SHORT)
    with pytest.raises(DataError, match="belongs to a sweep over other images"):
        sweep(train, test, [HeadSpec("gap", lr=0.2)], state=state, **SHORT)
    state.write_bytes(b"no state")
    with pytest.raises(DataError, match="Delete it"):
        sweep(train, test, [HeadSpec("gap")], state=state, **SHORT)


def test_queries_find_the_token_that_tells_the_class_where_the_mean_does_not():
    generator = torch.Generator().manual_seed(0)
    marks = torch.randn(4, 32, generator=generator)
    marks[:, 0] = 0

    def images(count):
        labels = torch.randint(4, (count,), generator=generator)
        patches = 2 * torch.randn(count, 32, 32, generator=generator)
        patches[:, :, 0] = 0
        place = torch.randint(32, (count,), generator=generator)
        patches[range(count), place] = 2 * marks[labels]
        patches[range(count), place, 0] = 8  # what marks the token; the class is in its other numbers
        return ArrayFeatures([patches], labels, 4)

    heads = grid(["gap", "ep_4"], optimizers=["adamw"], lrs=[0.01, 0.05])
    result = sweep(images(800), images(400), heads, epochs=12, batch_size=80, warmup_epochs=1)
    mean, probing = (head.best for head in result.chosen)
    assert probing.accuracy > 0.95
    assert mean.accuracy < 0.7
    assert probing.interval.low > mean.interval.high + 0.2


def test_a_head_that_diverges_does_not_disturb_the_others():
    train, test = double(), double(60, seed=1)
    sound = grid(["gap", "ep_4"], lrs=[1.0, 30.0])
    wild = [HeadSpec(name, optimizer="adamw", lr=1e308) for name in ("gap", "ep_4", "ep_2")]
    result = sweep(train, test, sound + wild, **SHORT)
    expected = sweep(train, test, sound, **SHORT)
    for head, other in zip(result.heads, expected.heads, strict=False):
        assert head.diverged == 0
        torch.testing.assert_close(head.best.nll, other.best.nll, rtol=1e-7, atol=1e-9)
    for head, row in zip(result.heads[4:], result.rows()[4:], strict=True):
        assert head.diverged == 1
        assert head.last is head.best is None
        assert math.isnan(row["test_best"])
        assert not row["chosen"]
    assert result.notes == ["All heads of ep_2 at layer 0 diverged; none was selected."]


def test_hold_out_is_stratified_and_keeps_the_only_image_of_a_class():
    labels = torch.tensor([0] * 100 + [1] * 24 + [2] * 2 + [3])
    rows = torch.arange(len(labels))
    kept, held = hold_out(labels, rows, 0.1, 0)
    assert torch.equal(torch.cat([kept, held]).sort().values, rows)
    assert labels[held].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert torch.equal(held, hold_out(labels, rows, 0.1, 0)[1])
    assert not torch.equal(held, hold_out(labels, rows, 0.1, 1)[1])
    assert len(hold_out(labels, rows, 0, 0)[1]) == 0
    with pytest.raises(InputError, match=r"from 0 to less than 1; got 1\.0"):
        hold_out(labels, rows, 1.0, 0)


def test_classes():
    train, test = clustered(150), clustered(60, seed=1)
    one_class = (train.labels == 1).nonzero().squeeze(1)
    with pytest.raises(InputError, match="at least two classes; got 1"):
        sweep(train, test, [HeadSpec("gap")], rows=one_class, **SHORT)
    two_classes = (train.labels != 1).nonzero().squeeze(1)
    with pytest.raises(InputError, match="test images but no training images: class 1"):
        sweep(train, test, [HeadSpec("gap")], rows=two_classes, **SHORT)
    test.labels = test.labels % 2
    result = sweep(train, test, [HeadSpec("gap")], **SHORT)
    assert result.notes == ["These classes have no test images, so that they are not evaluated: class 2."]
    with pytest.raises(InputError, match="the same layers and classes"):
        sweep(train, clustered(60, classes=4), [HeadSpec("gap")], **SHORT)


@pytest.mark.parametrize(
    ("heads", "options", "error", "message"),
    [
        ([], {}, InputError, "0 heads"),
        ([HeadSpec("gap")], {"epochs": 0}, InputError, "0 epochs"),
        ([HeadSpec("gap")], {"warmup_epochs": 9}, InputError, "9 warm-up epochs"),
        (
            [HeadSpec("gap")],
            {"batch_size": 151},
            InputError,
            "from 2 to 135, the number of images to train on; got 151",
        ),
        ([HeadSpec("gap")], {"holdout": -0.1}, InputError, r"from 0 to less than 1; got -0\.1"),
        ([HeadSpec("gap", layer=2)], {}, InputError, "reads layer 2, but the features have 1"),
        ([HeadSpec("nothing")], {}, UnknownNameError, "no pooling 'nothing'"),
        ([HeadSpec("ep_3")], {}, InputError, "out_dim divisible by num_queries"),
        ([HeadSpec("cls")], {}, InputError, "class token.*use 'gap'.*ep_M"),
        ([HeadSpec("ep_all_4")], {}, InputError, "class token.*use 'ep_4'"),
        (grid(["gap"], lrs=[1.0, 2.0]), {"holdout": 0}, InputError, "requires held-out training images"),
    ],
)
def test_what_cannot_be_swept_over(heads, options, error, message):
    train, test = clustered(150), clustered(60, seed=1)
    train, test = (ArrayFeatures(given.patches, given.labels, 3) for given in (train, test))
    with pytest.raises(error, match=message):
        sweep(train, test, heads, **(SHORT | options))


def test_specs_are_checked():
    for wrong in ({"optimizer": "sgd"}, {"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}):
        with pytest.raises(InputError, match="one of 'lars', 'adamw'"):
            HeadSpec("gap", **wrong)


@pytest.mark.parametrize("part", ["train", "test"])
def test_tokens_that_are_not_finite(part):
    given = {"train": clustered(150), "test": clustered(60, seed=1)}
    given[part].patches[0][7, 2, 3] = torch.nan
    with pytest.raises(
        DataError, match="'layer 0' contain NaN or infinity in 1 images of a batch, the first of them row 7"
    ):
        sweep(given["train"], given["test"], [HeadSpec("gap"), HeadSpec("ep_4")], holdout=0, **SHORT)


def test_float16_tokens_are_computed_in_float32():
    train, test = clustered(150, dtype=torch.float16), clustered(60, seed=1, dtype=torch.float16)
    wide = [ArrayFeatures([given.patches[0].float()], given.labels, 3) for given in (train, test)]
    head = sweep(train, test, [HeadSpec("ep_4")], **SHORT).heads[0]
    expected = sweep(*wide, [HeadSpec("ep_4")], **SHORT).heads[0]
    assert head.head.classifier.weight.dtype == torch.float32
    assert torch.equal(head.last.confidences, expected.last.confidences)
    assert F.softmax(head.head(wide[1].patches[0]), 1).isfinite().all()


class Floats(Features):
    """Other features, as float32 alone."""

    def __init__(self, features):
        self.features = features
        self.layers, self.labels, self.classes = features.layers, features.labels, features.classes

    def batches(self, rows, batch_size):
        return self.features.batches(rows, batch_size)


def test_int8_tokens_stay_so_for_efficient_probing_and_the_mean(backbone, tmp_path, monkeypatch):
    dtypes = []

    def spy(banks, tokens, scales):
        dtypes.append((type(banks[0].pooling), banks[0].kind, tokens.dtype))
        return group_logits(banks, tokens, scales)

    monkeypatch.setattr(head_training, "group_logits", spy)
    stored = store(tmp_path, backbone=backbone, precision="int8")
    heads = grid(["ep_4", "ep_all_4", "gap", "cls", "simpool"], layers=[0, 1], lrs=[10.0])
    options = {"epochs": 3, "batch_size": 8, "warmup_epochs": 1, "holdout": 0}
    found = sweep(stored, stored, heads, **options).heads
    kept = {(PatchProbing, "patches"), (TokenProbing, "all"), (Mean, "patches")}
    assert {(pooling, kind) for pooling, kind, dtype in dtypes if dtype == torch.int8} == kept
    rest = {(ClassToken, "class", torch.float32), (SimPool, "patches", torch.float32)}
    assert {found for found in dtypes if found[2] != torch.int8} == rest
    for one, other in zip(found, sweep(Floats(stored), Floats(stored), heads, **options).heads, strict=True):
        torch.testing.assert_close(one.head.classifier.weight, other.head.classifier.weight)
        torch.testing.assert_close(one.last.confidences, other.last.confidences)


def test_the_bar_moves_with_each_batch(monkeypatch):
    moves = []
    monkeypatch.setattr(Progress, "advance", lambda self, task: moves.append(self.tasks[task].total))
    progress = Progress(disable=True)
    sweep(clustered(150), clustered(60, seed=1), [HeadSpec("gap")], progress=progress, **SHORT)
    assert moves == [12] * 12
    assert not progress.tasks
