"""What the tests of retrieval share: pictures of coloured shapes, and a model that embeds by attributes."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import torch
from PIL import Image
from timm.models import register_model
from torch import nn

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
KINDS = ("bars", "columns", "disc")


def picture(colour, kind, seed=0, size=24):
    """A shape of a colour on white, moved by chance."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] + generator.integers(0, 4, (2, 1, 1))
    inside = {"bars": y // 3 % 2 == 0, "columns": x // 3 % 2 == 0, "disc": (y - 14) ** 2 + (x - 14) ** 2 < 60}[kind]
    pixels = np.where(inside[..., None], COLOURS[colour], 255) + generator.integers(-12, 12, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_table(folder, copies=4):
    """`table.csv` and `images/` of all colours and kinds: two copies to train on, one to validate, one to test."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, (copy, colour, kind) in enumerate(itertools.product(range(copies), COLOURS, KINDS)):
        picture(colour, kind, number).save(folder / f"images/{number:03d}.png")
        split = ("val", "test")[copy] if copy < 2 else "train"
        rows.append(
            [f"{number:03d}", split, "-" if split == "train" else ("gallery", "query")[number % 2], colour, kind]
        )
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "split", "role", "colour", "kind"], *rows])
    return folder / "table.csv"


def write_pictures(folder):
    """Eighteen pictures, some in a sub-folder."""
    for number, (copy, colour, kind) in enumerate(itertools.product(range(2), COLOURS, KINDS)):
        path = folder / f"{'more/' * copy}{number:02d}_{colour}_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(colour, kind, number).save(path)
    return folder


def toy(seed=0):
    """A model that embeds by colour and kind."""
    torch.manual_seed(seed)
    return ToyConditional(("colour", "kind"), 8).eval()


def plain(seed=0):
    """A model with one embedding for all, by colour and kind."""
    found = toy(seed)
    found.attributes, found.num_classes = (), 0
    found.forward = lambda x: found.head(found.forward_tokens(x), range(2)).flatten(1)
    return found


TOY_CONDITIONS = {"class": "kind", "closure": "kind", "gender": "colour", "heel": "colour"}


def write_triplets(folder, each=12):
    """Zappos' layout: `each` triplets a condition and part, by the kind or the colour that `TOY_CONDITIONS` says.

    In each triplet the far image agrees with the anchor in what its condition does not ask for, and the near does not.
    """
    generator = np.random.default_rng(0)
    images, lists = folder / "ut-zap50k-images", folder / "tripletlists"
    (images / "Shoes").mkdir(parents=True)
    lists.mkdir()
    toys = list(itertools.product(("train", "val", "test"), range(2), COLOURS, KINDS))
    for number, (_, _, colour, kind) in enumerate(toys):
        picture(colour, kind, number).save(images / f"Shoes/{number:02d}.png")
    (folder / "filenames.json").write_text("".join(f"Shoes/{number:02d}.png\n" for number in range(len(toys))))
    for part, (name, attribute) in itertools.product(("train", "val", "test"), TOY_CONDITIONS.items()):
        asked, other = (2, 3) if attribute == "colour" else (3, 2)
        own = [number for number, toy in enumerate(toys) if toy[0] == part]
        rows = [
            (a, f, n)
            for a, f, n in itertools.product(own, repeat=3)
            if toys[a][asked] == toys[n][asked] != toys[f][asked] and toys[a][other] == toys[f][other] != toys[n][other]
        ]
        chosen = [rows[place] for place in generator.choice(len(rows), each, replace=False)]
        lines = "".join(f"{a} {f} {n}\n" for a, f, n in chosen)
        (lists / f"{name}_tripletlist_{part}.txt").write_text(lines)
    return folder


class ToyConditional(nn.Module):
    """One linear head an attribute over the colours and edges of an image."""

    num_classes = 0
    num_features = 9
    task = "retrieve"

    def __init__(self, attributes, embed_dim):
        super().__init__()
        self.attributes = tuple(attributes)
        self.backbone = nn.Conv2d(3, 6, 3, padding=1)
        self.heads = nn.ModuleList([nn.Linear(9, embed_dim) for _ in attributes])
        self.pretrained_cfg = {
            "architecture": "toy_conditional",
            "input_size": (3, 24, 24),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        }

    def forward_tokens(self, x):
        return torch.cat([self.backbone(x).abs(), x], dim=1).flatten(2).transpose(1, 2)  # (B, N, D)

    def head(self, tokens, condition_ids):
        pooled = tokens.mean(dim=1)
        return nn.functional.normalize(torch.stack([self.heads[i](pooled) for i in condition_ids], 1), dim=-1)

    def forward(self, x, conditions=None):
        names = range(len(self.attributes)) if conditions is None else conditions
        return self.head(self.forward_tokens(x), [self.attributes.index(c) if isinstance(c, str) else c for c in names])

    def embed_pairs(self, x, conditions):
        return self(x)[torch.arange(len(x)), conditions]


@register_model
def toy_conditional(pretrained=False, attributes=("colour", "kind"), embed_dim=8, **kwargs):
    """The model, by its name in timm's registry."""
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    return ToyConditional(attributes, embed_dim, **kwargs)
