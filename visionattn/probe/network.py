"""A saved head with its backbone as one network: image in, result out."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from visionattn.errors import shorten
from visionattn.opening import Opened
from visionattn.probe.applying import open_classifier
from visionattn.probe.heads.files import read_head
from visionattn.probe.probed import ProbedModel
from visionattn.probe.tokens.backbone import Backbone

__all__ = ["head_network"]


def head_network(
    head: str | Path,
    *,
    backbone: str | Path | nn.Module | Backbone | None = None,
    checkpoint: str | Path | None = None,
) -> Opened:
    """Open a head of `visionattn probe` with its backbone as one network, which `visionattn.export` takes.

    Its outputs are logits (B, K) of a classification, logits (B, K, H, W) of a segmentation at the size of the images,
    probabilities (B, K) of several labels, or the numbers (B, K) of a regression.

    Args:
        head: A .safetensors file from the folder `heads` of a report.
        backbone: The backbone, if it has been moved or was a module: a name, file, folder or module.
        checkpoint: Weight file, if `backbone` is a name.

    Returns:
        The network on the CPU, with the origin and the licence of its weights.

    Raises:
        CheckpointError: The file is not such a head, or the head was trained on other weights of the backbone.
        InputError: The head does not state its backbone.
    """
    opened = open_classifier(head, backbone=backbone, checkpoint=checkpoint, device="cpu")
    facts = read_head(head)[1]["backbone"]
    mean, std = opened.mean, opened.std
    network = ProbedModel(opened.backbone, opened.head, opened.classes, mean, std, opened.task).eval()
    weights = f"{shorten(facts.get('weights') or facts['name'])}; {Path(head).name}"
    licence = facts.get("license")
    return Opened(network, weights, licence if isinstance(licence, str) else None)
