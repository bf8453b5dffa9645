"""Conditional heads on one backbone and schedule: CCA-style, a linear map per attribute, CSN, ASEN, and baselines.

    python -m benchmarks.retrieval.retrieval_heads --data FOLDER trivial
    python -m benchmarks.retrieval.retrieval_heads --data FOLDER --weights FILE frozen
    python -m benchmarks.retrieval.retrieval_heads --data FOLDER --weights FILE --device cuda tuned --epochs 30
        --lrs 3e-4

FOLDER holds attributes.csv and images.zip of fashion products. Values with fewer than 40 training items are unknown;
queries rank the whole gallery of the test part by cosine; mAP in percent. `judged` is the mean of subCategory,
articleType and baseColour, `all` that of the six attributes (gender, usage and season are skewed and hardly visible).

One model embeds all six attributes, 128 numbers each. Schedule, the same for all heads: triplets of margin 0.2 on
cosine (semi-hard), batches of 6 attributes x 4 values x 4 images, AdamW (weight decay 0.01), one epoch of warm-up,
cosine to 0. Each head takes the learning rate that has the best `judged` on the validation part; the test part chooses
nothing.

Frozen: the backbone's tokens of all images are computed once, without augmentation, and kept in --cache. Tuned: the
backbone learns at a tenth of the head's rate, images are flipped and shifted. `pooled` is the backbone's mean token.

Each finished run is a row of results/retrieval_heads.csv and, by condition, of results/retrieval_entanglement.csv; an
interrupted script resumes after them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import visionattn  # noqa: F401  registers va_cca
from benchmarks.report import RESULTS, environment, read_rows, write_rows
from visionattn.cost import count_parameters
from visionattn.data.retrieval.attribute_batches import AttributeSampler
from visionattn.data.retrieval.catalogue import Catalogue, Part
from visionattn.data.retrieval.catalogue_files import read_catalogue
from visionattn.data.retrieval.embedding import input_config
from visionattn.files import atomic_path
from visionattn.metrics.ranking import score
from visionattn.train.retrieve import AttributeLoss

ATTRIBUTES = ("gender", "subCategory", "articleType", "baseColour", "usage", "season")
JUDGED = ("subCategory", "articleType", "baseColour")
TRIVIAL = ("random", "pixels", "histogram")
HEADS = ("cca", "linear", "csn", "asen")
BATCH = {"values": 4, "items": 4}
DECAY, BACKBONE_RATE, EMBED_DIM, MARGIN = 0.01, 0.1, 128, 0.2
KEY = ("regime", "backbone", "head", "seed", "epochs", "pixels")


def trivial_features(name: str, catalogue: Catalogue, part: Part) -> Tensor:
    """L2-normalised features (N, D) that nobody trained.

    random: directions. pixels: the image in 16 x 16, less the part's mean image. histogram: roots of the shares of 512
    colours, of pixels whose darkest channel is below 212, since the products are on a white background.
    """
    if name == "random":
        return F.normalize(torch.randn(len(part.images), 64, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = []
    for image in map(catalogue.images.open, part.images):
        if name == "pixels":
            rows.append(np.asarray(image.resize((16, 16)), np.float32).ravel() / 255)
        else:
            pixels = np.asarray(image).reshape(-1, 3)
            red, green, blue = (pixels[pixels.min(1) < 212] // 32).astype(int).T
            rows.append(np.sqrt(np.bincount(64 * red + 8 * green + blue, minlength=512)).astype(np.float32))
    features = torch.from_numpy(np.stack(rows))
    return F.normalize(features - features.mean(0) if name == "pixels" else features, dim=1)


def matrix(spaces: Tensor, part: Part) -> Tensor:
    """Percent mAP (C, A) of spaces (N, C, E): attribute A in the space of condition C."""
    values = [
        [score(spaces[:, condition], part, column, name).map for column, name in enumerate(ATTRIBUTES)]
        for condition in range(spaces.shape[1])
    ]
    return 100 * torch.tensor(values)


def own(found: Tensor) -> dict[str, float]:
    """What each attribute has in its own space, and the means."""
    values = dict(zip(ATTRIBUTES, (found.diagonal() if len(found) > 1 else found[0]).tolist()))
    values["judged"] = sum(values[name] for name in JUDGED) / len(JUDGED)
    values["all"] = sum(values[name] for name in ATTRIBUTES) / len(ATTRIBUTES)
    return values


def create(args: argparse.Namespace, head: str) -> Any:
    return timm.create_model(
        "va_cca",
        backbone=args.backbone,
        attributes=list(ATTRIBUTES),
        embed_dim=EMBED_DIM,
        head=head,
        backbone_checkpoint=str(args.weights),
    )


def head_parameters(model: Any, tokens: Tensor) -> list[nn.Parameter]:
    """Those that the embeddings of given tokens depend on."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = model.head(tokens, torch.arange(len(ATTRIBUTES), device=tokens.device))
    gradients = torch.autograd.grad(embeddings.sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients) if gradient is not None]


def read_images(args: argparse.Namespace, catalogue: Catalogue, parts: dict[str, Part]) -> dict[str, Tensor]:
    """uint8 (N, 3, H, W) of each part."""
    size = (args.pixels, args.pixels)
    return {
        name: torch.stack(
            [
                torch.from_numpy(np.array(catalogue.images.open(file).resize(size, Image.Resampling.BICUBIC)))
                for file in part.images
            ]
        ).movedim(-1, 1)
        for name, part in parts.items()
    }


def normalise(images: Tensor, config: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(config[key], device=images.device).view(-1, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images, and shift each by up to a sixteenth of its side, with its border repeated."""
    count, _, side, _ = images.shape
    reach = side // 16
    place = torch.arange(side)
    rows, columns = ((place + torch.randint(-reach, reach + 1, (count, 1), generator=generator)) for _ in range(2))
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows, columns = (index.clamp(0, side - 1).to(images.device) for index in (rows, columns))
    batch = torch.arange(count, device=images.device)
    return images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def cached_tokens(args: argparse.Namespace, catalogue: Catalogue, parts: dict[str, Part]) -> dict[str, Tensor]:
    """Tokens fp16 (N, T, D) of each part, from the cache or computed now."""
    path = args.cache / f"{args.backbone}-{Path(args.weights).stem}-{args.pixels}.safetensors"
    if not path.exists():
        model = create(args, HEADS[0]).eval().to(args.device)
        config, found = input_config(model), {}
        for name, images in read_images(args, catalogue, parts).items():
            batches = (normalise(batch.to(args.device), config) for batch in images.split(64))
            found[name] = torch.cat([model.forward_tokens(batch).half().cpu() for batch in batches]).contiguous()
        with atomic_path(path) as temporary:
            save_file(found, temporary)
    return load_file(path, device=args.device)


def train(
    groups: list[dict[str, Any]],
    embed: Callable[[Tensor], Tensor],
    labels: Tensor,
    values: list[int],
    seed: int,
    epochs: int,
) -> None:
    """Minimise the loss of `embed` (places -> (B, C, E)) over the parameters in `groups`, which say their peak `lr`."""
    sampler = AttributeSampler(labels, **BATCH, num_replicas=1, rank=0, seed=seed)
    loss = AttributeLoss("triplet", "semihard", MARGIN, values, EMBED_DIM)
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    peaks = [group["lr"] for group in optimizer.param_groups]
    total, step = epochs * sampler.batches, 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = torch.tensor([key.sample for key in sampler])
        for places in order.split(sampler.batch_size):
            progress = (step - sampler.batches) / max(1, total - sampler.batches)
            rate = (step + 1) / sampler.batches if progress < 0 else (1 + math.cos(math.pi * progress)) / 2
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * rate
            embeddings = embed(places)
            optimizer.zero_grad()
            loss(embeddings, labels[places].to(embeddings.device)).backward()
            optimizer.step()
            step += 1


class Frozen:
    """Heads on tokens that are computed once."""

    def __init__(self, args: argparse.Namespace, catalogue: Catalogue, parts: dict[str, Part]) -> None:
        self.args, self.parts = args, parts
        self.values = [len(values) for values in catalogue.values.values()]
        self.tokens = cached_tokens(args, catalogue, parts)
        self.conditions = torch.arange(len(ATTRIBUTES), device=args.device)

    def run(self, head: str, seed: int, lr: float) -> tuple[dict[str, Tensor], int]:
        """Matrices of the validation and test part, and the number of parameters trained."""
        if head == "pooled":
            spaces = {name: F.normalize(self.tokens[name].float().mean(1), dim=-1)[:, None] for name in ("val", "test")}
            return {name: matrix(space.cpu(), self.parts[name]) for name, space in spaces.items()}, 0
        torch.manual_seed(seed)
        model = create(self.args, head).to(self.args.device).train()
        parameters = head_parameters(model, self.tokens["val"][:2].float())

        def embed(places: Tensor) -> Tensor:
            return model.head(self.tokens["train"][places.to(self.args.device)].float(), self.conditions)

        train(
            [{"params": parameters, "lr": lr}], embed, self.parts["train"].labels, self.values, seed, self.args.epochs
        )
        model.eval()
        found = {}
        with torch.no_grad():
            for name in ("val", "test"):
                batches = (tokens.float() for tokens in self.tokens[name].split(256))
                spaces = torch.cat([model.head(batch, self.conditions).cpu() for batch in batches])
                found[name] = matrix(spaces, self.parts[name])
        return found, sum(parameter.numel() for parameter in parameters)


class Tuned:
    """Backbone and head trained together."""

    def __init__(self, args: argparse.Namespace, catalogue: Catalogue, parts: dict[str, Part]) -> None:
        self.args, self.parts = args, parts
        self.values = [len(values) for values in catalogue.values.values()]
        self.images = {name: images.to(args.device) for name, images in read_images(args, catalogue, parts).items()}

    def run(self, head: str, seed: int, lr: float) -> tuple[dict[str, Tensor], int]:
        """Matrices of the validation and test part, and the number of parameters trained."""
        torch.manual_seed(seed)
        model = create(self.args, head).to(self.args.device)
        config = input_config(model)
        sample = normalise(self.images["val"][:2], config)
        own_parameters = head_parameters(model, model.eval().forward_tokens(sample).detach())
        ids = {id(parameter) for parameter in own_parameters}
        others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
        groups = [{"params": own_parameters, "lr": lr}, {"params": others, "lr": BACKBONE_RATE * lr}]
        generator = torch.Generator().manual_seed(seed)
        mixed = torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.device != "cpu")
        model.train()

        def embed(places: Tensor) -> Tensor:
            images = augment(self.images["train"][places.to(self.args.device)], generator)
            with mixed:
                return model(normalise(images, config)).float()

        train(groups, embed, self.parts["train"].labels, self.values, seed, self.args.epochs)
        model.eval()
        found = {}
        with torch.no_grad():
            for name in ("val", "test"):
                batches = (normalise(batch, config) for batch in self.images[name].split(128))
                found[name] = matrix(torch.cat([model(batch).float().cpu() for batch in batches]), self.parts[name])
        return found, count_parameters(model)


def write(args: argparse.Namespace, case: dict[str, Any], found: dict[str, Tensor], more: dict[str, Any]) -> None:
    """A row, and its entanglement matrix."""
    test, val = own(found["test"]), own(found["val"])
    shares = {f"test_{name}": f"{value:.2f}" for name, value in test.items()}
    origin = environment(args.device)
    row = {**case, **shares, "val_judged": f"{val['judged']:.2f}", **more, **origin}
    write_rows(args.output, [row], key=KEY)
    if len(found["test"]) > 1:
        rows = [
            {**case, "condition": name, **{key: f"{value:.2f}" for key, value in zip(ATTRIBUTES, values)}, **origin}
            for name, values in zip(ATTRIBUTES, found["test"].tolist())
        ]
        write_rows(args.output.with_name("retrieval_entanglement.csv"), rows, key=(*KEY, "condition"))
    print(f"{case}: " + ", ".join(f"{name} {value:.1f}" for name, value in test.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regime", choices=("trivial", "frozen", "tuned"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="safetensors of the backbone")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--heads", nargs="+", choices=(*HEADS, "pooled"), default=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/retrieval_heads"))
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieval_heads.csv")
    args = parser.parse_args()
    if args.regime != "trivial" and args.weights is None:
        parser.error("--weights is needed")

    catalogue = read_catalogue("table", args.data / "attributes.csv", attributes=ATTRIBUTES, min_count=40)
    parts = {name: catalogue.part(name) for name in ("train", "val", "test")}
    if args.regime == "trivial":
        ranked = {key: parts[key] for key in ("val", "test")}
        for name in TRIVIAL:
            found = {
                key: matrix(trivial_features(name, catalogue, part)[:, None], part) for key, part in ranked.items()
            }
            case = dict(zip(KEY, ("trivial", "", name, "", "", "")))
            write(args, case, found, {"lr": "", "parameters": "", "seconds": ""})
        return
    done = {tuple(row[key] for key in KEY) for row in read_rows(args.output)}
    runs = (Frozen if args.regime == "frozen" else Tuned)(args, catalogue, parts)
    for seed in args.seeds:
        for head in args.heads:
            learns = head != "pooled"
            case = dict(zip(KEY, (args.regime, args.backbone, head, seed, args.epochs if learns else 0, args.pixels)))
            if tuple(map(str, case.values())) in done:
                continue
            start = time.perf_counter()
            tried = {lr: runs.run(head, seed, lr) for lr in (args.lrs if learns else [0.0])}
            lr, (found, parameters) = max(tried.items(), key=lambda item: own(item[1][0]["val"])["judged"])
            seconds = f"{time.perf_counter() - start:.0f}"
            write(args, case, found, {"lr": lr, "parameters": parameters, "seconds": seconds})


if __name__ == "__main__":
    main()
