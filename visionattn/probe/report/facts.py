"""Facts in every report about its backbone, its images and the packages."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import visionattn
from visionattn.opening import Opened
from visionattn.probe.costs import backbone_cost
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["backbone_facts", "data_facts", "opening_facts", "versions"]


def backbone_facts(name: str, opened: Opened, backbone: Backbone, weights: str) -> dict[str, Any]:
    """Name, origin, licence, hash and costs of a backbone."""
    return {
        "name": name,
        "weights": opened.source,
        "license": opened.licence or "not stated",
        "sha256": weights,
        "given": opened.source == "as given",
        "channels": backbone.channels,
        **backbone_cost(backbone)._asdict(),
    }


def opening_facts(settings: ProbeSettings) -> dict[str, Any]:
    """How the backbone was opened, which a saved head repeats."""
    checkpoint = None if settings.checkpoint is None else str(settings.checkpoint)
    return {"checkpoint": checkpoint, "random": settings.random}


def data_facts(images: Any, train_images: int, test_images: int) -> dict[str, Any]:
    """Name, location, digests and preprocessing of the images."""
    return {
        "dataset": images.dataset,
        "root": images.root,
        "train_images": train_images,
        "test_images": test_images,
        "train_digest": images.train.digest,
        "test_digest": images.test.digest,
        "transform": images.transform,
        "image_size": images.image_size,
        "mean": list(images.mean),
        "std": list(images.std),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = {name: version(name) for name in ("torch", "timm", "numpy")}
    return {"visionattn": visionattn.__version__, "python": platform.python_version(), **packages}
