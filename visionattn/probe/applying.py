"""Use a head saved by `visionattn probe`: open its backbone, and classify images or predict their numbers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionattn.checkpoints import HOSTED
from visionattn.devices import find_device
from visionattn.errors import CheckpointError, InputError, shorten
from visionattn.files import atomic_path, violation
from visionattn.opening import open_backbone
from visionattn.probe.files import open_pictures
from visionattn.probe.given import eval_transform
from visionattn.probe.heads.banks import Head, head_tokens
from visionattn.probe.heads.files import read_head
from visionattn.probe.settings import LARGEST
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.loading import check_share, read_batches
from visionattn.weights.hashing import hash_state

__all__ = ["Applied", "HeadClassifier", "apply_head", "open_classifier", "write_applied"]

BATCH = 32
_COLUMNS = ("label", "class", "probability")
_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "classification": lambda logits: logits.softmax(1),
    "multilabel": torch.sigmoid,
    "regression": lambda logits: logits,
}
"""Task -> the outputs of a head from its logits (B, K)."""
_SCHEMA = {
    "layer": {"index": int, "name": str, "dim": int, "grid": [int]},
    "classes": [str],
    "backbone": {"name": str, "sha256": str, "given": bool, "random": bool, "checkpoint": (str, type(None))},
    "data": {"image_size": int, "mean": [(float, int)], "std": [(float, int)]},
    "command": str,
}


class Applied(NamedTuple):
    """Predictions of a head.

    Attributes:
        images: Names of the images that could be read.
        classes: Names of the classes, or of the targets of a regression.
        probabilities: Probability of each class for each image, float32 (n, K); of a regression the predicted numbers,
            in the units of the targets.
        skipped: Name of each image that could not be read, and the reason.
        task: "classification", "multilabel" (probabilities do not sum to 1) or "regression".
    """

    images: list[str]
    classes: tuple[str, ...]
    probabilities: Tensor
    skipped: list[tuple[str, str]]
    task: str = "classification"

    def top(self, k: int = 1) -> list[list[tuple[str, float]]]:
        """The most probable classes of each image, with their probabilities; ties are in the order of the classes."""
        found = []
        for row in self.probabilities.tolist():
            order = sorted(range(len(row)), key=lambda label: (-row[label], label))
            found.append([(self.classes[label], row[label]) for label in order[:k]])
        return found


class HeadClassifier:
    """A frozen backbone with a head.

    Args:
        backbone: Backbone that reads only the head's layer.
        head: Head in evaluation mode, on the backbone's device.
        classes: Names of the classes.
        mean: Mean of the images' normalisation.
        std: Standard deviation of the images' normalisation.
        task: "classification", "multilabel" or "regression".

    Attributes:
        transform: From a PIL image to an input of `__call__`, without the batch dimension.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        classes: tuple[str, ...],
        mean: list[float],
        std: list[float],
        task: str = "classification",
    ) -> None:
        self.backbone, self.head, self.classes, self.task = backbone, head, classes, task
        self.transform = eval_transform(len(mean), backbone.image_size[0], mean, std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> probabilities or numbers (B, K), float32 on the CPU."""
        tokens = head_tokens(self.backbone(images)[0], self.head.pooling.tokens)
        return _OUTPUTS[self.task](self.head(tokens.float())).cpu()


def apply_head(
    images: Any,
    head: str | Path,
    *,
    backbone: str | Path | nn.Module | Backbone | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Applied:
    """Classify images, or predict their numbers, with a frozen backbone and a head saved by `visionattn probe`.

    Args:
        images: A file, a folder with its sub-folders, a list of these, or a list of images: PIL images, uint8 arrays
            (H, W) or (H, W, C), uint8 tensors (C, H, W), or float tensors as the backbone takes them.
        head: A .safetensors file from the folder `heads` of a report. It states its backbone, image size, normalisation
            and classes.
        backbone: The backbone, if it has been moved or was a module: a name, file, folder or module.
        checkpoint: Weight file, if `backbone` is a name.
        device: "auto" (a GPU if available), or a device of PyTorch.

    Returns:
        Probabilities of the classes, or numbers of a regression.

    Raises:
        CheckpointError: The file is not such a head, or the head was trained on other weights of the backbone.
        DataError: There are no images, or more than 10 % and more than a few cannot be read.
        InputError: The head does not state its backbone, or an image has another type.
    """
    classifier = open_classifier(head, backbone=backbone, checkpoint=checkpoint, device=device)
    names, dataset = open_pictures(images, classifier.transform)
    cuts = [list(range(first, min(first + BATCH, len(names)))) for first in range(0, len(names), BATCH)]
    rows: list[int] = []
    skipped: list[tuple[int, str]] = []
    found: list[Tensor] = []
    for batch in read_batches(dataset, classifier.backbone.image_size, cuts, 0):
        rows += batch.rows
        skipped += batch.skipped
        if batch.images is not None:
            found.append(classifier(batch.images))
    check_share(skipped, len(names))
    return Applied(
        [names[row] for row in rows],
        classifier.classes,
        torch.cat(found),
        [(names[row], reason) for row, reason in skipped],
        classifier.task,
    )


def open_classifier(
    head: str | Path,
    *,
    backbone: str | Path | nn.Module | Backbone | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "auto",
) -> HeadClassifier:
    """Open a head with its backbone (see `apply_head`)."""
    where = find_device(device)
    read, facts = read_head(head)
    wrong = violation(facts, _SCHEMA) or _bad_value(facts)
    if wrong:
        told = f"Run its command again: `{shorten(facts['command'], 400)}`." if "command" in facts else ""
        raise CheckpointError(
            f"{shorten(head)} does not state its inputs ({wrong}), like heads of earlier versions. {told}".rstrip()
        )
    size, layer = facts["data"]["image_size"], facts["layer"]
    backbone = backbone.model if isinstance(backbone, Backbone) else backbone
    model = _open_backbone(head, facts["backbone"], size, backbone, checkpoint)
    autocast = torch.bfloat16 if where.type == "cuda" else None
    reading = Backbone(model.to(where), [layer["index"]], image_size=size, autocast=autocast)
    ours = reading.layers[0]
    if hash_state(reading.model.state_dict()) != facts["backbone"]["sha256"]:
        raise CheckpointError(
            f"{shorten(head)} was trained on {shorten(facts['backbone']['name'])} with other weights "
            f"({shorten(facts['backbone']['weights'])}): give these with --backbone and --checkpoint."
        )
    if (ours.dim, list(ours.grid)) != (layer["dim"], layer["grid"]) or reading.channels != len(facts["data"]["mean"]):
        raise CheckpointError(f"{shorten(head)} does not match layer {ours.name} of its backbone.")
    data, task = facts["data"], facts.get("task", "classification")
    return HeadClassifier(reading, read.to(where), tuple(facts["classes"]), data["mean"], data["std"], task)


def _bad_value(facts: dict[str, Any]) -> str | None:
    """A value of a head's metadata that has the right type but is not valid; None if all are."""
    data = facts["data"]
    if not 1 <= data["image_size"] <= LARGEST:
        return f"images of {data['image_size']} pixels"
    if len(data["mean"]) != len(data["std"]) or not all(map(math.isfinite, data["mean"])):
        return "an invalid normalisation"
    if not all(0 < value < math.inf for value in data["std"]):
        return "an invalid normalisation"
    if facts.get("task", "classification") not in tuple(_OUTPUTS):
        return f"the task {shorten(facts['task'])}"
    return None


def _open_backbone(
    head: str | Path,
    facts: dict[str, Any],
    size: int,
    backbone: str | Path | nn.Module | None,
    checkpoint: str | Path | None,
) -> nn.Module:
    if backbone is None and checkpoint is None:
        if facts["given"]:
            raise InputError(f"The backbone of {shorten(head)} was a Python object: pass it again as backbone=.")
        if facts["name"].startswith(HOSTED):  # a file must not decide what is downloaded
            name = shorten(facts["name"])
            raise InputError(f"{shorten(head)} reads {name}. Add --backbone {name} to allow its download.")
        checkpoint = facts["checkpoint"]
    random = facts["random"] and backbone is None and checkpoint is None
    try:
        return open_backbone(
            facts["name"] if backbone is None else backbone,
            checkpoint,
            random,
            image_size=size,
        ).model
    except CheckpointError as error:
        raise CheckpointError(f"{error} --backbone and --checkpoint say where the backbone lies.") from error


def write_applied(applied: Applied, file: str | Path, top: int = 1, probabilities: bool = False) -> None:
    """Write one row per image, in the format of `visionattn predict` for a trained model.

    Args:
        applied: Predictions of the head.
        file: Output file; JSON if it ends in .json, otherwise CSV.
        top: Number of the most probable classes, each with its index, name and probability.
        probabilities: Write the probability of every class instead, as is always done for heads of multi-label
            classification; heads of regression have a number per target.

    Raises:
        StorageError: The file could not be written.
    """
    probabilities = probabilities or applied.task != "classification"
    rows = _every_class(applied) if probabilities else _likeliest(applied, top)
    with (
        atomic_path(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        if Path(file).suffix.lower() == ".json":
            outputs = "values" if applied.task == "regression" else "probabilities"
            json.dump([_nested(row, top, outputs if probabilities else None) for row in rows], stream, indent=1)
            stream.write("\n")
            return
        writer = csv.writer(stream)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)


def _every_class(applied: Applied) -> list[dict[str, Any]]:
    table = zip(applied.images, applied.probabilities.tolist())
    digits = "{:.6g}".format if applied.task == "regression" else _digits
    return [{"image": image, **dict(zip(applied.classes, map(digits, row)))} for image, row in table]


def _likeliest(applied: Applied, top: int) -> list[dict[str, Any]]:
    labels = {name: label for label, name in enumerate(applied.classes)}
    rows = []
    for image, entries in zip(applied.images, applied.top(top)):
        row: dict[str, Any] = {"image": image}
        for place, (name, probability) in enumerate(entries, 1):
            values = (labels[name], name, _digits(probability))
            row |= {f"{column}_{place}" if place > 1 else column: value for column, value in zip(_COLUMNS, values)}
        rows.append(row)
    return rows


def _nested(row: dict[str, Any], top: int, outputs: str | None) -> dict[str, Any]:
    """A row for JSON: outputs are numbers, and several classes a list, or a mapping with the name `outputs`."""
    image, *values = row.values()
    if outputs:
        return {"image": image, outputs: dict(zip(list(row)[1:], map(float, values)))}
    classes = [
        {"label": label, "class": name, "probability": float(share)}
        for label, name, share in zip(values[::3], values[1::3], values[2::3])
    ]
    return {"image": image, **classes[0]} if top == 1 else {"image": image, "classes": classes}


def _digits(probability: float) -> str:
    return f"{probability:.6f}"
