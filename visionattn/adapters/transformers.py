"""Vision models of Hugging Face transformers as backbones: opening a folder, and their hidden states as layers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visionattn.adapters.base import AdaptedModel
from visionattn.errors import CheckpointError, DataError, InputError, require, shorten
from visionattn.files import read_json, read_text

__all__ = ["TransformersModel", "is_of_transformers", "open_transformers"]


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder was written by `save_pretrained` of transformers: its configuration names a type of model."""
    try:
        return "model_type" in read_json(folder / "config.json", {})
    except DataError:
        return False


def open_transformers(folder: Path) -> TransformersModel:
    """Open the model in a folder; code in it is not run, and nothing is downloaded.

    Raises:
        CheckpointError: transformers could not open it.
        InputError: It is no vision model.
        MissingPackageError: transformers is not installed.
    """
    transformers: Any = require("transformers", "transformers")
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
    except Exception as error:
        # transformers raises almost any exception for damaged files.
        raise CheckpointError(f"{shorten(folder)} could not be opened by transformers: {shorten(error)}.") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return TransformersModel(model, folder).eval()


class TransformersModel(AdaptedModel):
    """A vision model of Hugging Face transformers: its layers are its hidden states, the last one `last_hidden_state`.

    Args:
        model: Such as `AutoModel.from_pretrained(FOLDER)`; of a model of images and texts, its `vision_model` is used.
        folder: Folder of its `preprocessor_config.json` with size and normalisation; without it the model's size
            and ImageNet's normalisation are used.
    """

    def __init__(self, model: nn.Module, folder: str | Path | None = None) -> None:
        net: Any = getattr(model, "vision_model", model)
        config = net.config
        name = str(getattr(config, "model_type", type(net).__name__))
        self._accepts = inspect.signature(net.forward).parameters
        if "pixel_values" not in self._accepts or name == "vit_mae":
            reason = "hides a random part of each image" if name == "vit_mae" else "takes no images"
            raise InputError(f"{type(net).__name__} of transformers cannot be a backbone: it {reason}.")
        size, mean, std = _preprocessing(config, folder)
        super().__init__(name, size, mean, std)
        self.model = net.eval()
        with torch.no_grad():
            weight = next(net.parameters())
            image = torch.zeros(1, len(mean), size, size, device=weight.device, dtype=weight.dtype)
            last = self.read(image, norm=True)[-1]
        if last.ndim == 3:
            patch = getattr(config, "patch_size", None)
            patches = (size // patch) ** 2 if isinstance(patch, int) else 0
            # Models that merge tokens return fewer tokens than patches, and no prefix tokens.
            self.num_prefix_tokens = max(0, last.shape[1] - patches) if patches <= last.shape[1] else 0
            self.has_class_token = self.num_prefix_tokens > 0

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """See `AdaptedModel.read`."""
        options: dict[str, Any] = {"output_hidden_states": True, "return_dict": True}
        if "interpolate_pos_encoding" in self._accepts:
            options["interpolate_pos_encoding"] = tuple(images.shape[2:]) != (self.model.config.image_size,) * 2
        found = self.model(pixel_values=images, **options)
        hidden = list(found.hidden_states or ())[1:]
        if not hidden or norm:
            hidden[-1:] = [found.last_hidden_state]
        return hidden


def _preprocessing(config: Any, folder: str | Path | None) -> tuple[int, Sequence[float], Sequence[float]]:
    """Side of the images, mean and standard deviation of a model of transformers."""
    size: Any = getattr(config, "image_size", None) or 224
    statistics = [tuple(values) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    if getattr(config, "num_channels", 3) == 1:
        statistics = [(sum(values) / len(values),) for values in statistics]
    folder = folder or getattr(config, "_name_or_path", None)
    file = Path(folder, "preprocessor_config.json") if folder else None
    try:
        if file is not None and file.is_file():
            content = json.loads(read_text(file))
            size = content.get("crop_size") or content.get("size") or size
            keys = ("image_mean", "image_std")
            statistics = [tuple(map(float, content.get(key, old))) for key, old in zip(keys, statistics)]
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        size = int(size[0] if isinstance(size, (list, tuple)) else size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"Could not read {shorten(file or 'the model')}: {shorten(error)}.") from error
    return size, *statistics
