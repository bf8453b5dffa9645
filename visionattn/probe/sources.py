"""What is given as a backbone: its weights, its name in reports, and opening it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from visionattn.adapters import AdaptedModel
from visionattn.errors import InputError, shorten
from visionattn.opening import Opened, is_file, open_backbone
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["BackboneSource", "Source", "backbone_name", "find_sources", "folder_names", "open_source"]

BackboneSource = str | Path | nn.Module | Backbone


class Source(NamedTuple):
    """One of several backbones, with its own weights (see `ProbeSettings`)."""

    backbone: BackboneSource
    checkpoint: str | Path | None
    random: bool


def open_source(
    backbone: BackboneSource,
    checkpoint: str | Path | None,
    random: bool,
    image_size: int | tuple[int, int] | None,
) -> Opened:
    """Open a backbone; a module is copied (errors: see `visionattn.opening.open_backbone`)."""
    if isinstance(backbone, Backbone):
        return open_source(backbone.model, checkpoint, random, image_size)
    if isinstance(backbone, nn.Module):
        backbone = copy.deepcopy(backbone)
    return open_backbone(backbone, checkpoint, random, image_size=image_size)


def backbone_name(backbone: BackboneSource) -> str:
    """Name of a backbone in reports."""
    if isinstance(backbone, Backbone):
        backbone = backbone.model
    if isinstance(backbone, AdaptedModel):
        return backbone.name
    return type(backbone).__name__ if isinstance(backbone, nn.Module) else str(backbone)


def find_sources(backbones: Sequence[BackboneSource], settings: ProbeSettings) -> list[Source]:
    """Backbones to compare; `NAME=FILE` is a name with its weight file.

    Raises:
        InputError: There are fewer than two, one is given twice, or a setting applies to a single backbone only.
    """
    if len(backbones) < 2:
        raise InputError(f"A comparison requires at least two backbones; got {len(backbones)}.")
    twice = [str(one) for place, one in enumerate(backbones) if one in backbones[:place]]
    if twice:
        raise InputError(f"{shorten(twice[0])} is given twice.")
    if settings.task != "classification":
        raise InputError(f"Several backbones can be compared for classification only; got the task {settings.task!r}.")
    if settings.checkpoint is not None or settings.export:
        raise InputError("--checkpoint and --export require a single backbone; use NAME=FILE to give each its weights.")
    found = []
    for backbone in backbones:
        name, equals, file = str(backbone).partition("=")
        if isinstance(backbone, str) and equals and not is_file(name) and not os.path.exists(backbone):
            found.append(Source(name, file, False))
        else:
            random = settings.random and isinstance(backbone, (str, Path)) and not is_file(backbone)
            found.append(Source(backbone, None, random))
    return found


def folder_names(names: Sequence[str]) -> list[str]:
    """Names of backbones as names of folders, with numbers added to equal ones."""
    plain = [re.sub(r"[^\w.-]+", "-", Path(name).stem if os.path.exists(name) else name)[:100] for name in names]
    return [f"{name}-{place}" if plain.count(name) > 1 else name for place, name in enumerate(plain, 1)]
