"""Data sets of noise, a small backbone, and the stores that are made of them."""

from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset

from visionattn.errors import DataError
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import extract

IDENTITY = {"model": "small", "transform": "none", "dataset": "noise"}
CLASSES = ("cat", "dog", "owl")


class Images(Dataset):
    """Noise, of which some images are broken; `stop` is the row at which reading is killed."""

    def __init__(self, count=22, size=32, broken=(), stop=None):
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.broken = broken
        self.stop = stop

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        if row == self.stop:
            raise KeyboardInterrupt
        if row in self.broken:
            raise (OSError, SyntaxError, DataError)[row % 3](f"image {row} is truncated")
        return self.images[row], row % 3


def vit(reg_tokens=0, class_token=True, **options):
    pool = "token" if class_token else "avg"
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, **options}
    model = VisionTransformer(reg_tokens=reg_tokens, class_token=class_token, global_pool=pool, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def store(folder, dataset=None, backbone=None, **options):
    backbone = backbone or Backbone(vit(), image_size=32)
    options = {"identity": IDENTITY, "classes": CLASSES, "batch_size": 3, "shard_images": 8, **options}
    return extract(backbone, Images() if dataset is None else dataset, folder, **options)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def read(found, rows, batch_size=5):
    """All rows at once: a list of tokens a layer, each a list of parts."""
    batches = list(found.batches(torch.as_tensor(rows), batch_size))
    assert torch.cat([some for some, _ in batches]).tolist() == list(rows)
    layers = zip(*(tokens for _, tokens in batches))
    return [[None if p[0] is None else torch.cat(p) for p in zip(*layer)] for layer in layers]


def assert_equal(ours, theirs, **tolerance):
    for one, other in zip(ours, theirs, strict=True):
        for part, expected in zip(one, other, strict=True):
            assert (part is None) == (expected is None)
            if part is not None:
                torch.testing.assert_close(part, expected, **(tolerance or {"rtol": 0, "atol": 0}))
