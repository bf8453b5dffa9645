"""Use a head saved by `visionattn probe` on images: classify or segment them, or predict their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.checkpoints import HOSTED
from visionattn.devices import find_device
from visionattn.errors import CheckpointError, InputError, shorten
from visionattn.files import violation
from visionattn.opening import open_backbone
from visionattn.probe.files import open_pictures
from visionattn.probe.given import eval_transform
from visionattn.probe.heads.banks import Head, head_tokens
from visionattn.probe.heads.files import read_head
from visionattn.probe.segmentation.heads import LinearSegmenter, predict_masks
from visionattn.probe.settings import LARGEST
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.loading import check_share, read_batches
from visionattn.weights.hashing import hash_state

__all__ = ["Applied", "HeadClassifier", "apply_head", "open_classifier"]

BATCH = 32
_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "classification": lambda logits: logits.softmax(-1),
    "segmentation": lambda logits: logits.softmax(-1),
    "multilabel": torch.sigmoid,
    "regression": lambda logits: logits,
}
"""Task -> the outputs of a head from its logits (B, K), or (B, N, K) for segmentation."""
_SCHEMA = {
    "layer": {"index": int, "name": str, "dim": int, "grid": [int]},
    "classes": [str],
    "backbone": {"name": str, "sha256": str, "given": bool, "random": bool, "checkpoint": (str, type(None))},
    "data": {"image_size": (int, list), "mean": [(float, int)], "std": [(float, int)]},
    "command": str,
}


class Applied(NamedTuple):
    """Predictions of a head.

    Attributes:
        images: Names of the images that could be read.
        classes: Names of the classes, or of the targets of a regression.
        probabilities: Probability of each class for each image, float32 (n, K); of a regression the predicted numbers,
            in the units of the targets; of a segmentation the share of the pixels of each class.
        skipped: Name of each image that could not be read, and the reason.
        task: "classification", "segmentation", "multilabel" (probabilities do not sum to 1) or "regression".
        masks: Of a segmentation, the class of each pixel of each image, uint8 (H, W); otherwise empty.
    """

    images: list[str]
    classes: tuple[str, ...]
    probabilities: Tensor
    skipped: list[tuple[str, str]]
    task: str = "classification"
    masks: Sequence[np.ndarray] = ()

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
        task: "classification", "segmentation", "multilabel" or "regression".

    Attributes:
        transform: From a PIL image to an input of `__call__`, without the batch dimension.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | LinearSegmenter,
        classes: tuple[str, ...],
        mean: list[float],
        std: list[float],
        task: str = "classification",
    ) -> None:
        self.backbone, self.head, self.classes, self.task = backbone, head, classes, task
        self.mean, self.std = mean, std
        size = backbone.image_size
        self.transform = eval_transform(len(mean), size if task == "segmentation" else size[0], mean, std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> probabilities or numbers (B, K), float32 on the CPU.

        Heads of segmentation have probabilities for each patch, (B, N, K), row by row of the grid.
        """
        tokens = head_tokens(self.backbone(images)[0], self.head.tokens)
        return _OUTPUTS[self.task](self.head(tokens.float())).cpu()

    @torch.no_grad()
    def segment(self, image: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Normalised image (C, H, W) -> the class of each pixel at a height and width, uint8.

        Raises:
            InputError: The head is not for segmentation.
        """
        if not isinstance(self.head, LinearSegmenter):
            raise InputError(f"Masks require a head for segmentation; this is a head for {self.task}.")
        patches = self.backbone(image[None])[0].patches.float()
        return predict_masks(self.head, patches, self.backbone.layers[0].grid, size).byte().cpu().numpy()

    def apply(self, images: Any) -> Applied:
        """Read images and predict (see `apply_head`)."""
        names, dataset = open_pictures(images, self.transform)
        cuts = [list(range(first, min(first + BATCH, len(names)))) for first in range(0, len(names), BATCH)]
        rows: list[int] = []
        skipped: list[tuple[int, str]] = []
        found: list[Tensor] = []
        masks: list[np.ndarray] = []
        for batch in read_batches(dataset, self.backbone.image_size, cuts, 0):
            rows += batch.rows
            skipped += batch.skipped
            if batch.images is None:
                continue
            if self.task == "segmentation":
                new = [self.segment(image, dataset.size(row)) for image, row in zip(batch.images, batch.rows)]
                masks += new
                found.append(torch.stack([self._shares(mask) for mask in new]))
            else:
                found.append(self(batch.images))
        check_share(skipped, len(names))
        return Applied(
            [names[row] for row in rows],
            self.classes,
            torch.cat(found),
            [(names[row], reason) for row, reason in skipped],
            self.task,
            masks,
        )

    def _shares(self, mask: np.ndarray) -> Tensor:
        """Share of the pixels of each class, (K,)."""
        return torch.from_numpy(np.bincount(mask.ravel(), minlength=len(self.classes)) / mask.size).float()


def apply_head(
    images: Any,
    head: str | Path,
    *,
    backbone: str | Path | nn.Module | Backbone | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Applied:
    """Classify or segment images, or predict their numbers, with a frozen backbone and a head of `visionattn probe`.

    Args:
        images: A file, a folder with its sub-folders, a list of these, or a list of images: PIL images, uint8 arrays
            (H, W) or (H, W, C), uint8 tensors (C, H, W), or float tensors as the backbone takes them.
        head: A .safetensors file from the folder `heads` of a report. It states its backbone, image size, normalisation
            and classes.
        backbone: The backbone, if it has been moved or was a module: a name, file, folder or module.
        checkpoint: Weight file, if `backbone` is a name.
        device: "auto" (a GPU if available), or a device of PyTorch.

    Returns:
        Probabilities of the classes, numbers of a regression, or masks of a segmentation.

    Raises:
        CheckpointError: The file is not such a head, or the head was trained on other weights of the backbone.
        DataError: There are no images, or more than 10 % and more than a few cannot be read.
        InputError: The head does not state its backbone, or an image has another type.
    """
    return open_classifier(head, backbone=backbone, checkpoint=checkpoint, device=device).apply(images)


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
    facts = {"task": "classification", **facts}  # heads of earlier versions do not state it
    wrong = violation(facts, _SCHEMA) or _bad_value(facts)
    if wrong:
        told = f"Run its command again: `{shorten(facts['command'], 400)}`." if "command" in facts else ""
        raise CheckpointError(
            f"{shorten(head)} does not state its inputs ({wrong}), like heads of earlier versions. {told}".rstrip()
        )
    layer, data = facts["layer"], facts["data"]
    size = tuple(data["image_size"]) if facts["task"] == "segmentation" else data["image_size"]
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
    if (ours.dim, list(ours.grid)) != (layer["dim"], layer["grid"]) or reading.channels != len(data["mean"]):
        raise CheckpointError(f"{shorten(head)} does not match layer {ours.name} of its backbone.")
    return HeadClassifier(reading, read.to(where), tuple(facts["classes"]), data["mean"], data["std"], facts["task"])


def _bad_value(facts: dict[str, Any]) -> str | None:
    """A value of a head's metadata that has the right type but is not valid; None if all are."""
    data, task = facts["data"], facts["task"]
    if task not in tuple(_OUTPUTS):
        return f"the task {shorten(task)}"
    # One side of a square, or height and width.
    wanted, sides = (2, data["image_size"]) if task == "segmentation" else (1, [data["image_size"]])
    if not isinstance(sides, list) or len(sides) != wanted or not all(map(_is_side, sides)):
        return f"images of {shorten(data['image_size'])} pixels"
    if len(data["mean"]) != len(data["std"]) or not all(map(math.isfinite, data["mean"])):
        return "an invalid normalisation"
    if not all(0 < value < math.inf for value in data["std"]):
        return "an invalid normalisation"
    return None


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= LARGEST


def _open_backbone(
    head: str | Path,
    facts: dict[str, Any],
    size: int | tuple[int, int],
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
