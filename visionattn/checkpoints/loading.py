"""Building a model from a weight file: `visionattn.load(FILE)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from visionattn.checkpoints.building import build
from visionattn.checkpoints.by_shapes import find_by_shapes
from visionattn.checkpoints.creating import check_name, create
from visionattn.checkpoints.weight_file import WeightFile
from visionattn.errors import CheckpointError, shorten

__all__ = ["load"]


def load(path: str | Path, name: str | None = None, *, drop_classifier: bool = False, **model_args: Any) -> nn.Module:
    """Build the model that a weight file belongs to, with its weights, ready for inference.

    For a checkpoint of `visionattn fit`, timm's `model.pretrained_cfg` describes the training images: input_size,
    mean, std, interpolation, crop_pct, crop_mode and label_names. Nothing is imported or downloaded.

    Args:
        path: A checkpoint of `visionattn fit`, a file of bare weights (safetensors, or a pickle, wrapped as training
            code wraps it or not, in our layout or, of the families SPAN and MatchStereo, a published one), either file
            of ncnn's pair .param and .bin, or a folder written by timm's `save_for_hf`.
        name: Model name, if the file does not contain it and its shapes fit several. The authors' MatchFlow files need
            it: without it they are read as MatchStereo, whose shapes they share.
        drop_classifier: Build the named model without its classifier, and leave out the file's. Its arguments in the
            file's card apply if the card is of this model.
        **model_args: Further arguments of the model, which take precedence.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        CheckpointError: The file is unreadable, or fits no model or not the named one; the first mismatches are named.
            Or its weights are NaN or infinite.
        UnknownNameError: No model has that name.
    """
    path = Path(path)
    if path.is_dir() and not drop_classifier:
        return _load_folder(path, model_args)
    if name is not None and not drop_classifier:
        check_name(name)
    file = WeightFile.read(path)
    if drop_classifier:
        if name is None:
            raise CheckpointError("drop_classifier requires the name of the model.")
        card, found = file.card, None
        stated = card.model_args if card is not None and card.name == name.split(".")[0] else {}
        model = create(name, **{**stated, **model_args, "num_classes": 0})
    else:
        found, args = file.identify(name)
        if found is None:
            found, args = find_by_shapes(file, args)
        model = build(file, found, {**args, **model_args})
    file.load_into(model, found, drop_classifier)
    return model.eval()


def _load_folder(folder: Path, model_args: dict[str, Any]) -> nn.Module:
    """Open a folder that timm's `save_for_hf` wrote."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"The folder {shorten(folder)} holds no config.json, so it was not written by save_for_hf."
        )
    return create(f"local-dir:{folder}", pretrained=True, **model_args).eval()
