"""Networks of other libraries as backbones: any function, torchvision models, vision models of transformers.

Each becomes a module with the token interface of timm's models: `forward_intermediates`, `num_prefix_tokens`,
`has_class_token` and `pretrained_cfg`. A layer returns maps (B, D, H, W), or tokens (B, P + N, D) whose first P are the
class token and registers, or features (B, D), which count as one patch token.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visionattn.errors import InputError, shorten
from visionattn.files import read_text

__all__ = ["CLASSIFIERS", "AdaptedModel", "FunctionModel", "TorchvisionModel", "TransformersModel", "adapt"]


CLASSIFIERS = ("fc", "classifier", "heads", "head")
"""Names of the last layers of torchvision's classifiers."""


class AdaptedModel(nn.Module):
    """Base of adapted networks.

    Args:
        name: Name of the network.
        image_size: Side of the images.
        mean: Mean for normalisation, one value per channel.
        std: Standard deviation, likewise.
        num_prefix_tokens: Tokens before the patches, P.
        has_class_token: Whether the first of them is a class token; the others are registers.
    """

    num_classes = 0

    def __init__(
        self,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_prefix_tokens: int = 0,
        has_class_token: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.in_chans = name, len(mean)
        self.num_prefix_tokens, self.has_class_token = num_prefix_tokens, has_class_token
        self.pretrained_cfg = {
            "architecture": name,
            "input_size": (len(mean), image_size, image_size),
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """Outputs of the layers; with `norm`, the last one is the input of the network's own head."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As in timm's models: layers as maps (B, D, H, W), or as tokens (B, N, D) if `output_fmt` is "NLC"."""
        layers = self.read(x, norm)
        chosen = layers if indices is None else [layers[index] for index in indices]
        found = [self._split(layer, x, return_prefix_tokens, output_fmt) for layer in chosen]
        return found if intermediates_only else (None, found)

    def _split(self, layer: Tensor, images: Tensor, with_prefix: bool, output_fmt: str) -> Any:
        if len(layer) != len(images) or layer.ndim not in (2, 3, 4):
            raise InputError(
                f"{self.name} must return (B, D), (B, N, D) or (B, D, H, W) for images "
                f"{tuple(images.shape)}; got {tuple(layer.shape)}."
            )
        layer = layer.unsqueeze(1) if layer.ndim == 2 else layer
        prefix = layer[:, :0] if layer.ndim == 4 else layer[:, : self.num_prefix_tokens]
        patches = layer if layer.ndim == 4 else layer[:, self.num_prefix_tokens :]
        if patches.ndim == 3 and output_fmt == "NCHW":
            patches = patches.transpose(1, 2).unflatten(2, self._grid(patches.shape[1], images))
        elif patches.ndim == 4 and output_fmt == "NLC":
            patches = patches.flatten(2).transpose(1, 2)
        return (patches, prefix) if with_prefix else patches

    def _grid(self, count: int, images: Tensor) -> tuple[int, int]:
        """Height and width of the patch grid, with the aspect ratio of the images."""
        height, width = images.shape[2:]
        rows = round((count * height / width) ** 0.5)
        if count == 0 or rows == 0 or rows * (count // rows) != count or rows * width != count // rows * height:
            raise InputError(
                f"{self.name} returns {count} patch tokens for images of {height} x {width} "
                "pixels, which form no grid of that shape: state how many of its tokens are not patches (class_token, "
                "registers)."
            )
        return rows, count // rows


class FunctionModel(AdaptedModel):
    """Any function of images (B, C, H, W) that returns tokens, features or a map (see the module).

    Args:
        function: A module, or another callable. The weights of a callable are unknown: its
            output for one image identifies them.
        image_size: Side of the images.
        mean: Mean for normalisation; the default is ImageNet's.
        std: Standard deviation for normalisation; the default is ImageNet's.
        class_token: The first token is a class token.
        registers: Number of tokens after it that are not patches.
        device: Device of the images for a function that is not a module.
        name: Name in reports; the function's own by default.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        *,
        image_size: int,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        class_token: bool = False,
        registers: int = 0,
        device: str | torch.device = "cpu",
        name: str | None = None,
    ) -> None:
        if not callable(function):
            raise InputError(f"A function of images is required; got {shorten(type(function).__name__)}.")
        own = str(getattr(function, "__name__", type(function).__name__))
        super().__init__(name or own, image_size, mean, std, int(class_token) + registers, class_token)
        self.function, self.runs_on = function, None if isinstance(function, nn.Module) else torch.device(device)
        if self.runs_on is not None or next(self.parameters(), None) is None:
            noise = torch.rand(1, len(mean), image_size, image_size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                self.register_buffer("response", self._compute(noise).float())

    def _compute(self, images: Tensor) -> Tensor:
        found = self.function(images if self.runs_on is None else images.to(self.runs_on))
        try:
            return torch.as_tensor(found).to(images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.name} must return a tensor; got {shorten(type(found).__name__)}.") from error

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """See `AdaptedModel.read`."""
        return [self._compute(images)]


class TorchvisionModel(AdaptedModel):
    """A torchvision classifier without its last linear layers.

    Layers are its stages; the last one is the input of its pooling, or for a ViT the tokens after the final norm, which
    is applied to its other layers too.

    Args:
        model: Such as `torchvision.models.resnet50()`. It is modified.
    """

    def __init__(self, model: nn.Module) -> None:
        net: Any = model
        self_attending = hasattr(model, "class_token") and hasattr(model, "encoder")
        size = net.image_size if self_attending else 224
        prefix = int(self_attending)
        name = type(model).__name__
        super().__init__(name, size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, prefix, self_attending)
        for part in CLASSIFIERS:
            if hasattr(model, part):
                setattr(model, part, nn.Identity())
        self.model = model
        self.norm = net.encoder.ln if self_attending else None
        self.channels_last = hasattr(model, "permute") and hasattr(model, "norm")  # Swin
        self.stages = [stage for stage, _ in self._find_stages()]
        self.feature_info = [{"module": stage} for stage in self.stages]

    def _find_stages(self) -> list[tuple[str, nn.Module]]:
        net: Any = self.model
        for part in ("encoder.layers", "trunk_output", "features", "blocks", "layers"):
            try:
                found = net.get_submodule(part)
            except AttributeError:
                continue
            return [(f"{part}.{name}", module) for name, module in found.named_children()]
        names = [name for name, _ in net.named_children() if name.startswith(("layer", "stage", "Mixed_", "inception"))]
        if not names:
            raise InputError(f"{type(net).__name__} of torchvision is not supported: it has no stages.")
        return [(name, getattr(net, name)) for name in names]

    def read(self, images: Tensor, norm: bool) -> list[Tensor]:
        """See `AdaptedModel.read`."""
        found: dict[str, Tensor] = {}
        with _watching(self.model, self.stages, found):
            self.model(images)
        layers = [found[name] for name in self.stages]
        if self.norm is not None:
            return [self.norm(layer) for layer in layers] if norm else layers
        if self.channels_last:
            layers = [layer.movedim(-1, 1) for layer in layers]
        return [*layers[:-1], found["pooled"]] if norm and "pooled" in found else layers


@contextmanager
def _watching(model: nn.Module, stages: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Record the outputs of stages and the input of the pooling, with temporary hooks, so that models can be copied."""

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.__setitem__(name, output)

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in stages]
    pooling = getattr(model, "avgpool", None)
    if isinstance(pooling, nn.Module):
        hooks.append(pooling.register_forward_pre_hook(lambda module, args: found.__setitem__("pooled", args[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def adapt(model: nn.Module) -> nn.Module:
    """A module as a backbone: those of torchvision or transformers are adapted, any other is returned unchanged."""
    if hasattr(model, "forward_intermediates"):
        return model
    module = type(model).__module__
    if module.startswith("torchvision.models"):
        return TorchvisionModel(model)
    if module.startswith("transformers."):
        return TransformersModel(model)
    return model
