"""A resumed run takes, bit for bit, the steps of an uninterrupted one."""

from __future__ import annotations

import signal

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging

from visionattn.data.classify import datamodule
from visionattn.data.classify.datamodule import ClassifyData
from visionattn.errors import ConfigError
from visionattn.train.checkpoint_io import AtomicCheckpointIO
from visionattn.train.classify import ClassifyTask
from visionattn.train.resume import ExactResume, Interrupted

BATCHES, BATCH_SIZE, EPOCHS = 4, 64, 3


@pytest.fixture(autouse=True, scope="module")
def _few_digits():
    """Train on a quarter of the images: as many steps, in less time."""
    load = datamodule.load_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "load_digits", lambda split: [part[:300] for part in load(split)])
        yield


class Steps(Callback):
    """Keeps the loss of each update, the step under which it is logged, and the accuracy of each validation."""

    def __init__(self):
        self.losses, self.accuracies = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = outputs["loss"].item(), trainer.fit_loop.epoch_loop._batches_that_stepped

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.accuracies[trainer.global_step] = trainer.callback_metrics["val/accuracy"].item()


class SaveEverywhere(Callback):
    """Saves a checkpoint at each place where Lightning's ModelCheckpoint can."""

    def __init__(self, folder):
        self.folder = folder

    def _save(self, trainer, place):
        trainer.save_checkpoint(self.folder / f"{place}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch")


class PressCtrlC(Callback):
    """Sends the signal of Ctrl-C, once, during an update or the validation after it."""

    def __init__(self, step, in_validation=False):
        self.step, self.in_validation = step, in_validation

    def _press(self):
        self.step = None
        signal.raise_signal(signal.SIGINT)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.in_validation and trainer.global_step + 1 == self.step:
            self._press()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.in_validation and trainer.global_step == self.step:
            self._press()


def fit(folder, *callbacks, num_workers=0, ckpt_path=None, seed=0, batch_size=BATCH_SIZE, **trainer_args):
    seed_everything(seed, workers=True, verbose=False)
    task = ClassifyTask(
        model_args={"depth": 2, "embed_dim": 32, "num_heads": 2, "drop_rate": 0.2, "drop_path_rate": 0.2},
        mixup=0.4,
        cutmix=0.5,
        label_smoothing=0.1,
        warmup_epochs=1,
    )
    data = ClassifyData(augmentation="shift", batch_size=batch_size, num_workers=num_workers)
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[EMAWeightAveraging(decay=0.9), steps, *callbacks, ExactResume()],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, **trainer_args},
    )
    try:
        trainer.fit(task, data, ckpt_path=ckpt_path)
    except Interrupted as stop:
        return steps, task.state_dict(), stop.checkpoint
    # At the end of training the averaged weights are in the model.
    return steps, task.state_dict(), None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    steps, weights, _ = fit(folder, SaveEverywhere(folder))
    assert list(steps.losses) == list(range(1, BATCHES * EPOCHS + 1))
    return folder, steps, weights


def assert_continues(steps, weights, resumed, resumed_weights, step):
    assert resumed.losses == {s: loss for s, loss in steps.losses.items() if s > step}
    assert all(torch.equal(weights[key], resumed_weights[key]) for key in weights)


PLACES = [("batch", 2), ("batch", 4), ("batch", 7), ("validation", 4), ("epoch", 4), ("epoch", 8)]


@pytest.mark.parametrize(("place", "step", "workers"), [(*p, 0) for p in PLACES] + [("batch", 6, 2), ("epoch", 4, 2)])
def test_resumed_run_equals_uninterrupted_run(uninterrupted, tmp_path, place, step, workers):
    folder, steps, weights = uninterrupted
    resumed, resumed_weights, _ = fit(tmp_path, num_workers=workers, ckpt_path=folder / f"{place}-{step}.ckpt", seed=99)
    assert_continues(steps, weights, resumed, resumed_weights, step)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(("place", "step"), [("batch", 3), ("epoch", 4)])
def test_resume_where_training_is_counted_in_steps(tmp_path, place, step, validate):
    settings = {"max_epochs": -1, "max_steps": 7, "limit_val_batches": None if validate else 0}
    steps, weights, _ = fit(tmp_path, SaveEverywhere(tmp_path), **settings)
    ckpt_path = tmp_path / f"{place}-{step}.ckpt"
    resumed, resumed_weights, _ = fit(tmp_path, ckpt_path=ckpt_path, seed=99, **settings)
    assert_continues(steps, weights, resumed, resumed_weights, step)


@pytest.mark.parametrize(
    ("pressed", "stopped"),
    [
        (PressCtrlC(2), 2),
        # The last update of an epoch is followed by its validation.
        (PressCtrlC(4), 4),
        (PressCtrlC(8, in_validation=True), 8),
    ],
)
def test_ctrl_c_saves_a_place_to_go_on_from(uninterrupted, tmp_path, pressed, stopped):
    _, steps, weights = uninterrupted
    handler = signal.getsignal(signal.SIGINT)
    first, _, checkpoint = fit(tmp_path, pressed)
    assert checkpoint == tmp_path / "last.ckpt"
    assert max(first.losses) == stopped
    resumed, resumed_weights, _ = fit(tmp_path, ckpt_path=checkpoint, seed=99)
    assert_continues(steps, weights, resumed, resumed_weights, stopped)
    # No validation is lost and none is repeated.
    assert {**first.accuracies, **resumed.accuracies} == steps.accuracies
    assert not first.accuracies.keys() & resumed.accuracies.keys()
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_stops_between_updates_and_not_before_a_validation(tmp_path):
    # Two batches an update, validation after batches 2 and 4: no place inside an epoch is safe.
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 0.5}
    first, _, checkpoint = fit(tmp_path, PressCtrlC(1), **settings)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert max(first.losses) == 2


def test_other_batches_cannot_resume_inside_an_epoch(uninterrupted, tmp_path):
    folder, *_ = uninterrupted
    with pytest.raises(ConfigError, match=r"divided into batches of 64; now it is batches of 32"):
        fit(tmp_path, ckpt_path=folder / "batch-2.ckpt", batch_size=32)


def test_checkpoint_holds_plain_values_only(uninterrupted):
    folder, *_ = uninterrupted
    checkpoint = torch.load(folder / "batch-2.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"]["ExactResume"]["ranks"]
    assert set(state) == {"torch", "cuda", "numpy", "python"}
    assert checkpoint["callbacks"]["ExactResume"]["loader"]["batches"] == 2
