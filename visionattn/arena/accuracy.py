"""Accuracy on images: a small vision transformer per mixer, of the same size as the one with softmax attention.

Mixers differ in parameters and in multiply-accumulates. To compensate for this, the width of the MLPs is set for each
mixer: once so that the network has as many parameters as the one with softmax attention, and once as many
multiply-accumulates. There is no class token, which not all mixers support: tokens are averaged.

Images are the embedded digits (8 x 8 pixels, one token per pixel), or a folder with `train` and `test` (or `val`), each
with a folder per class, whose images of one size are cut into 8 x 8 patches. The model of the last epoch is tested; no
setting is selected on the test images.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.arena.nets import create_mixer, train
from visionattn.arena.plan import Found, Plan
from visionattn.data.classify.digits import load_digits
from visionattn.data.classify.sources import split_folders
from visionattn.data.images import check_unreadable, class_folders, list_images, read_rgb
from visionattn.errors import DataError, VisionAttnError, shorten
from visionattn.mixers import Mixer
from visionattn.mixers.deconstruct import StaticQKMixer

__all__ = ["EQUAL", "Images", "Network", "mlp_width", "read_folder", "run"]

GRID = (8, 8)
EQUAL = ("parameters", "MACs")
BATCH = 64


class Images(NamedTuple):
    """Patches of images, (n, 64, values), and labels (n,), for training and for testing."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int


class Size(NamedTuple):
    """Channels, blocks and heads of a network."""

    dim: int
    depth: int
    heads: int


SMALL_SIZE, LARGE_SIZE = Size(32, 2, 2), Size(64, 4, 4)


def patches(images: np.ndarray) -> Tensor:
    """(n, H, W, channels) of bytes -> (n, 64, values) from -1 to 1."""
    n, height, width, channels = images.shape
    rows, columns = height // GRID[0], width // GRID[1]
    cut = torch.from_numpy(images).view(n, GRID[0], rows, GRID[1], columns, channels).transpose(2, 3)
    return cut.reshape(n, GRID[0] * GRID[1], rows * columns * channels).float() / 127.5 - 1


@cache
def read_images(folder: Path | None) -> Images:
    """The digits, or the images of a folder."""
    if folder is not None:
        return read_folder(folder)
    (train_images, train_labels), (test_images, test_labels) = (load_digits(split) for split in ("train", "test"))
    return Images(
        patches(train_images[..., None]),
        torch.from_numpy(train_labels),
        patches(test_images[..., None]),
        torch.from_numpy(test_labels),
        10,
    )


def read_folder(folder: str | Path) -> Images:
    """Read `train/CLASS/*` and `test/CLASS/*`, or `val` if there is no `test`.

    Raises:
        DataError: A split is missing or empty, classes differ, or the images do not have one size divisible by 8.
    """
    found, _ = split_folders(folder)
    parts = [found["train"], found["test"] or found["val"]]
    if parts[0] is None or parts[1] is None:
        raise DataError(
            f"{shorten(folder)} must contain the folders train and test (or val), each with one folder per class."
        )
    read = [_read_part(part) for part in parts if part is not None]
    if read[0][2] != read[1][2]:
        raise DataError(f"The classes of {shorten(parts[0])} and {shorten(parts[1])} differ.")
    sizes = {images.shape[1:] for images, _, _ in read}
    if len(sizes) > 1:
        raise DataError(f"The images of {shorten(folder)} must have one size; found {sorted(sizes)[:3]}.")
    (train_images, train_labels, names), (test_images, test_labels, _) = read
    return Images(patches(train_images), train_labels, patches(test_images), test_labels, len(names))


def _read_part(folder: Path) -> tuple[np.ndarray, Tensor, list[str]]:
    names = class_folders(folder)
    images: list[np.ndarray] = []
    labels: list[int] = []
    failures: list[str] = []
    for label, below in enumerate(names.values()):
        for file in list_images(below, recursive=True).files:
            try:
                images.append(read_rgb(file))
                labels.append(label)
            except VisionAttnError as error:
                failures.append(str(error))
    check_unreadable(failures, len(images) + len(failures))
    sizes = {image.shape for image in images}
    if len(sizes) != 1 or any(side % 8 for side in next(iter(sizes))[:2]):
        found = ", ".join(f"{size[0]} x {size[1]}" for size in sorted(sizes)[:3]) or "no images"
        raise DataError(f"The images of {shorten(folder)} must have one size, divisible by 8; found {found}.")
    return np.stack(images), torch.tensor(labels), list(names)


class Block(nn.Module):
    """Pre-norm block: mixer, MLP, residuals."""

    def __init__(self, mixer: Mixer, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(mixer.dim), nn.LayerNorm(mixer.dim)
        self.mixer = mixer
        self.mlp = nn.Sequential(nn.Linear(mixer.dim, hidden), nn.GELU(), nn.Linear(hidden, mixer.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64, C) -> (B, 64, C)."""
        x = x + self.mixer(self.norm1(x), GRID)
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Patch and learned position embeddings, blocks, mean of the tokens, linear.

    Shape:
        (B, 64, values) -> (B, classes).
    """

    def __init__(self, name: str, values: int, classes: int, size: Size, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(values, size.dim)
        self.position = nn.Parameter(torch.randn(GRID[0] * GRID[1], size.dim))
        mixers = [create_mixer(name, size.dim, size.heads, GRID) for _ in range(size.depth)]
        self.blocks = nn.ModuleList(Block(mixer, hidden) for mixer in mixers)
        self.norm = nn.LayerNorm(size.dim)
        self.head = nn.Linear(size.dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(x) + self.position
        first = None  # normalised tokens of the first block
        for block in self.blocks:
            assert isinstance(block, Block)
            if isinstance(block.mixer, StaticQKMixer):
                first = block.norm1(x) if first is None else first
                block.mixer.source = first
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def mlp_width(name: str, size: Size, equal: str) -> int:
    """Hidden channels of the MLPs such that a block costs as much as with softmax attention and 4 C channels.

    Args:
        name: Name of the mixer.
        size: Size of the network.
        equal: Cost to equalise, `"parameters"` or `"MACs"`.

    Returns:
        The width, at least 1.
    """
    tokens = GRID[0] * GRID[1]

    def cost(kind: str) -> int:
        mixer = create_mixer(kind, size.dim, size.heads, GRID, device="meta")
        return mixer.macs(tokens) if equal == "MACs" else sum(p.numel() for p in mixer.parameters())

    # An MLP has 2 C weights and a bias for each hidden channel.
    each = 2 * size.dim * tokens if equal == "MACs" else 2 * size.dim + 1
    return max(1, 4 * size.dim + round((cost("softmax") - cost(name)) / each))


def run(name: str, seed: int, plan: Plan, device: torch.device, folder: Path | None = None) -> list[Found]:
    """Train the network at equal parameters and at equal multiply-accumulates, and test it.

    Args:
        name: Name in `MIXERS`.
        seed: Seed of parameters and the order of images.
        plan: Sizes of the run.
        device: Device of training and tests.
        folder: Folder of images; None: the digits.
    """
    images = read_images(folder)
    size = SMALL_SIZE if folder is None else LARGE_SIZE
    known: dict[int, float] = {}  # networks of the same width are the same
    found = []
    for equal in EQUAL:
        width = mlp_width(name, size, equal)
        if width not in known:
            known[width] = _train_and_test(name, seed, plan, device, images, size, width)
        found += [Found("accuracy", f"equal {equal}", known[width]), Found("MLP width", f"equal {equal}", float(width))]
    return found


def _train_and_test(
    name: str, seed: int, plan: Plan, device: torch.device, images: Images, size: Size, width: int
) -> float:
    torch.manual_seed(seed)
    net = Network(name, images.train.shape[2], images.classes, size, width).to(device)
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = images.train.to(device), images.train_labels.to(device)
    batches = max(1, len(inputs) // BATCH)
    order = torch.cat([torch.randperm(len(inputs), generator=generator)[: batches * BATCH] for _ in range(plan.epochs)])
    chosen = order.to(device).split(min(BATCH, len(inputs)))
    train(net, lambda step: F.cross_entropy(net(inputs[chosen[step]]), labels[chosen[step]]), len(chosen))
    right = 0
    with torch.inference_mode():
        for x, y in zip(images.test.split(500), images.test_labels.split(500)):
            right += int((net(x.to(device)).argmax(dim=1).cpu() == y).sum())
    return right / len(images.test_labels)
