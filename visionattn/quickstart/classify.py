"""Classify handwritten digits: train two transformers and export the better one to ONNX.

The data are scikit-learn's 1,797 digits of 8 x 8 pixels. The baseline ViT is compared with the paper's minimum variant,
which has a tenth of the parameters, no values and no MLP.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageChops, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import visionattn
from visionattn.cost import count_macs, count_parameters
from visionattn.data.classify.datamodule import ClassifyData
from visionattn.export import OnnxModel, export_onnx, print_rows
from visionattn.files import atomic_path
from visionattn.quickstart import TITLE
from visionattn.train.checkpoint_io import AtomicCheckpointIO
from visionattn.train.classify import ClassifyTask
from visionattn.train.throughput import ImagesPerSecond

NAMES = {"baseline": "va_minimal_vit_nano_patch7_28", "minimum": "va_minimal_vit_nano_patch7_28_minimum"}
EPOCHS = 28
TILE = 84  # pixels of a digit in the image
SHOWN = 12

README = """
| file | what it is |
| --- | --- |
| `baseline.ckpt`, `minimum.ckpt` | checkpoints of the two networks at their best validation accuracy |
| `{better}.onnx` | the better one for ONNX Runtime: any batch, any image size, checked against PyTorch |
| `predictions.png` | test digits, predictions of the ONNX file, and attention of the class token in the last block |
| `log/` | loss and accuracy of every epoch as CSV |

{table}

Digits classified correctly by the ONNX file: {right} of {count}.

## The same by command, in this folder

    visionattn fit --config minimal_vit_digits          # train, with a recipe to copy and change
    visionattn export {better}.ckpt --output model.onnx  # checkpoint to checked ONNX file
    visionattn list                                     # every model

## The same with your images

Put the images of each class into a folder of its own, optionally inside `train/` and `val/`:

    visionattn fit finetune_folder YOUR_FOLDER --model.checkpoint WEIGHTS_OF_A_BACKBONE

## In Python

    import visionattn
    model = visionattn.load("{better}.ckpt")

    from visionattn.export import OnnxModel
    logits = OnnxModel("{better}.onnx")(images)[0]     # images: float array (B, 1, H, W), normalised as its .spec says
"""


@dataclass
class Result:
    """A trained network and its metrics on the test digits."""

    model: Any
    metrics: dict[str, float]


class Bar(Callback):
    """Moves one bar of a shared progress display."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self.progress = progress
        self.bar = bar

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Advance by a step."""
        self.progress.update(self.bar, advance=1, total=trainer.estimated_stepping_batches)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Show the accuracy of the epoch."""
        self.progress.update(self.bar, accuracy=f"{100 * trainer.callback_metrics['val/accuracy']:.1f} %")


def _train(label: str, folder: Path, bar: Bar) -> Result:
    seed_everything(0, verbose=False)
    best = ModelCheckpoint(folder / "checkpoints", label, monitor="val/accuracy", mode="max")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[bar, best, ImagesPerSecond()],
        logger=CSVLogger(folder, "log", label),
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ClassifyData("digits", augmentation="shift", batch_size=32)
    task = ClassifyTask(NAMES[label], lr=2e-3, warmup_epochs=2.0)
    trainer.fit(task, data)
    speed = float(trainer.callback_metrics["train/images_per_second"])
    shutil.move(best.best_model_path, folder / f"{label}.ckpt")
    model = visionattn.load(folder / f"{label}.ckpt")
    task.net.load_state_dict(model.state_dict())
    metrics = trainer.test(task, data, verbose=False)[0]
    return Result(model, {**metrics, "train/images_per_second": speed})


def _table(results: dict[str, Result]) -> Table:
    columns = ["network", "test accuracy", "loss", "calibration error", "parameters", "MACs", "images/s in training"]
    table = Table(columns[0], title="Test digits", title_justify="left")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for label, result in results.items():
        found = result.metrics
        table.add_row(
            label,
            f"{100 * found['test/accuracy']:.2f} %",
            f"{found['test/loss']:.3f}",
            f"{100 * found['test/calibration_error']:.2f} %",
            f"{count_parameters(result.model):,}",
            f"{count_macs(result.model, (1, 28, 28)) / 1e6:.2f} M",
            f"{found['train/images_per_second']:,.0f}",
        )
    return table


def _markdown(table: Table) -> str:
    cells = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    head, *rows = zip(*cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


@torch.no_grad()
def _class_token_maps(model: Any, images: torch.Tensor) -> np.ndarray:
    """Attention of the class token in the last block, (B, h, w), each map scaled to 0..1."""
    attention = model.blocks[-1].attn
    seen: list[torch.Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    maps = attention.attention_weights(seen[0]).mean(dim=1)[:, 0, 1:]  # (B, N)
    maps = maps / maps.amax(dim=1, keepdim=True)
    return maps.unflatten(1, model.patch_embed.grid_size).numpy()


def _draw(path: Path, digits: np.ndarray, labels: np.ndarray, named: np.ndarray, maps: np.ndarray) -> None:
    """Digits with their predictions above their attention maps, wrong predictions in red."""
    picture = Image.new("RGB", (SHOWN * TILE, 2 * TILE + 20), "white")
    pen = ImageDraw.Draw(picture)
    for place, (digit, label, name, attention) in enumerate(zip(digits, labels, named, maps)):
        left = place * TILE
        pen.text((left + 4, 4), f"{label} named {name}", fill="black" if label == name else "red")
        grey = Image.fromarray(digit).resize((TILE, TILE), Image.Resampling.NEAREST)
        picture.paste(grey.convert("RGB"), (left, 20))
        heat = Image.fromarray((255 * attention).astype(np.uint8)).resize((TILE, TILE), Image.Resampling.BILINEAR)
        dim = grey.point(lambda value: value // 2)
        coloured = Image.merge("RGB", (ImageChops.lighter(heat, dim), dim, dim))
        picture.paste(coloured, (left, 20 + TILE))
    with atomic_path(path) as temporary:
        picture.save(temporary)


def visit(folder: Path, console: Console) -> None:
    """Train, compare, export, check, and classify with the ONNX file; write everything into `folder`."""
    results = {}
    # Such small networks gain nothing from a second thread, and become slower on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    # Lightning's advice on worker counts and hardware is for users of its trainer.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), Progress(*columns, console=console) as progress:
        warnings.simplefilter("ignore")
        bars = {label: progress.add_task(f"{label:9}", total=None, start=False, accuracy="") for label in NAMES}
        for label, bar in bars.items():
            progress.start_task(bar)
            results[label] = _train(label, folder, Bar(progress, bar))
    torch.set_num_threads(threads)
    (folder / "checkpoints").rmdir()
    table = _table(results)
    console.print(table)

    better = max(results, key=lambda label: results[label].metrics["test/accuracy"])
    model = results[better].model
    with console.status(f"Exporting the {better} network to ONNX"):
        file = export_onnx(model, folder / f"{better}.onnx", weights=f"{better}.ckpt, trained by visionattn quickstart")
    print_rows(file.rows, console, file.spec.unchecked or ())

    mean, std = (list(model.pretrained_cfg[key]) for key in ("mean", "std"))
    data = ClassifyData("digits", image_size=28, in_chans=1, mean=mean, std=std, batch_size=360)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    named = OnnxModel(file.path)(images.numpy())[0].argmax(axis=1)
    correct = named == labels.numpy()
    mistakes = np.flatnonzero(~correct)[: SHOWN // 3]
    chosen = np.concatenate([mistakes, np.flatnonzero(correct)[: SHOWN - len(mistakes)]])
    shown = images[chosen]
    digits = ((shown[:, 0] * std[0] + mean[0]) * 255).clamp(0, 255).byte().numpy()
    maps = _class_token_maps(model, shown)
    _draw(folder / "predictions.png", digits, labels.numpy()[chosen], named[chosen], maps)
    right = int(correct.sum())
    console.print(
        f"The ONNX file classifies {right} of {len(labels)} test digits correctly: {folder / 'predictions.png'}"
    )
    text = README.format(better=better, table=_markdown(table), right=right, count=len(labels))
    (folder / "README.md").write_text(TITLE + text)
