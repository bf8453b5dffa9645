"""Swap mixers into a trained transformer without training: feature error and k-NN accuracy per set of layers.

    python -m benchmarks.mixers.zero_shot --root FOLDER                   # CIFAR-10 sheets
    python -m benchmarks.mixers.zero_shot --root FOLDER --steps 300       # then short fine-tuning of all layers

Features are the mean tokens of the last layer. Their error is |swapped - trained| / |trained - mean of trained|, root
mean square over test images. Accuracy is that of 20 neighbours by the cosine of standardised features; index and
queries pass the same network. Three draws of training images give the spread; `softmax` is the trained network, and
`mean` and `identity` are the controls.

Fine-tuning, a short recipe: the swapped network learns the trained one's tokens (mean squared error, no labels) by
AdamW at 3e-4 with a cosine, batches of 64.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionattn
from benchmarks.models.small_images import CONFIG, load
from benchmarks.report import RESULTS, environment, read_rows, write_rows

MODEL = "va_minimal_vit_micro_patch4_32"
MIXERS: dict[str, tuple[str, dict]] = {
    "hsa, windows 4": ("hsa", {"windows": 4}),
    "hsa, windows 2": ("hsa", {"windows": 2}),
    "window 7, inward": ("window", {"kernel": 7}),
    "window 5, inward": ("window", {"kernel": 5}),
    "window 3, inward": ("window", {"kernel": 3}),
    "mean": ("mean", {}),
    "identity": ("identity", {}),
}
DRAWS, TRAIN, TEST, NEIGHBOURS = 3, 2000, 2000, 20
KEY = ("model", "mixer", "layers", "steps", "device")


def layer_sets(depth: int) -> dict[str, list[int]]:
    """Name -> layers whose attention is swapped."""
    every = list(range(depth))
    return {
        "last": every[-1:],
        "every second": every[1::2],
        "first half": every[: depth // 2],
        "last half": every[depth // 2 :],
        "all": every,
    }


def swapped(model_name: str, mixer: str, settings: dict, layers: list[int]) -> nn.Module:
    """The trained network with another mixer in some layers."""
    model = timm.create_model(model_name, pretrained=True).eval()
    for layer in layers:
        visionattn.swap(model, mixer, where=f"blocks.{layer}.attn", **settings)
    return model


def prepare(model: nn.Module, images: Tensor) -> Tensor:
    """CIFAR-10 images, normalised by `load`, at the size and with the mean and deviation that a model wants."""
    given, wanted = timm.get_pretrained_cfg(CONFIG["cifar10"]), model.pretrained_cfg
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in pair)
        for pair in ((given.mean, given.std), (wanted["mean"], wanted["std"]))
    )
    if (size := tuple(model.patch_embed.img_size)) != tuple(images.shape[2:]):
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    return (images * std + mean - own_mean) / own_std


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Mean tokens (n, C)."""
    model.eval()
    prefix = model.num_prefix_tokens
    return torch.cat(
        [model.forward_features(prepare(model, batch))[:, prefix:].mean(dim=1) for batch in images.split(250)]
    )


def neighbour_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor) -> float:
    """Accuracy of the vote of the nearest training images, weighted by exp(cosine / 0.1)."""
    mean, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (F.normalize((x - mean) / deviation, dim=1) for x in (train, test))
    near, index = (test @ train.T).topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(test), int(labels.max()) + 1, device=test.device)
    votes.scatter_add_(1, train_labels[index], (near / 0.1).exp())
    return (votes.argmax(dim=1) == labels).float().mean().item()


def finetune(model: nn.Module, trained: nn.Module, images: Tensor, steps: int) -> None:
    """Let the swapped network learn the trained one's tokens."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(steps):
        batch = images[torch.randint(len(images), (64,), generator=generator)]
        with torch.no_grad():
            target = trained.forward_features(prepare(trained, batch))
        optimiser.zero_grad()
        F.mse_loss(model.forward_features(prepare(model, batch)), target).backward()
        optimiser.step()
        schedule.step()


def measure(model: nn.Module, reference: Tensor, data: dict) -> dict[str, str]:
    """Error and accuracies of a network."""
    (train_images, train_labels), (test_images, labels) = data["train"], data["test"]
    train, test = features(model, train_images), features(model, test_images)
    spread = (reference - reference.mean(dim=0)).square().mean().sqrt()
    parts = torch.arange(DRAWS * TRAIN).view(DRAWS, TRAIN)
    found = sorted(neighbour_accuracy(train[part], train_labels[part], test, labels) for part in parts)
    return {
        "feature_error": f"{((test - reference).square().mean().sqrt() / spread).item():.4f}",
        "knn_accuracy": f"{sum(found) / DRAWS:.4f}",
        "knn_lowest": f"{found[0]:.4f}",
        "knn_highest": f"{found[-1]:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a timm name with weights, for the images of the sheets")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning, with all layers swapped")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    data = load("cifar10", args.root, args.device)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", DRAWS * TRAIN), ("test", TEST)):
        images, labels = data[part]
        chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
        data[part] = images[chosen], labels[chosen]
    trained = timm.create_model(args.model, pretrained=True).eval().to(args.device)
    reference = features(trained, data["test"][0])
    origin = environment(args.device)
    sets = layer_sets(len(trained.blocks))
    cases = [("softmax", "softmax", {}, "none", [])]
    for label, (mixer, settings) in MIXERS.items():
        cases += [(label, mixer, settings, name, sets[name]) for name in (["all"] if args.steps else sets)]
    path = RESULTS / "mixers_zero_shot.csv"
    known = {tuple(row[column] for column in KEY) for row in read_rows(path)}
    for label, mixer, settings, name, layers in cases:
        identity = dict(zip(KEY, (args.model, label, name, str(args.steps if layers else 0), origin["device"])))
        if tuple(identity.values()) in known:
            continue
        model = swapped(args.model, mixer, settings, layers).to(args.device)
        if args.steps and layers:
            finetune(model, trained, data["train"][0], args.steps)
        row = {**identity, **measure(model, reference, data), "training_images": TRAIN, "test_images": TEST, **origin}
        print(*list(row.values())[:8], sep=" | ", flush=True)
        write_rows(path, [row], KEY)


if __name__ == "__main__":
    main()
