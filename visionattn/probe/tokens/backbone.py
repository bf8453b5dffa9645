"""A frozen backbone whose tokens are read at selected layers: any model with timm's `forward_intermediates`."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from visionattn.adapters import AdaptedModel, FunctionModel, adapt
from visionattn.errors import InputError, shorten
from visionattn.probe.tokens.interface import Layer, Tokens

__all__ = ["Backbone", "make_backbone"]


class Backbone:
    """Reads patches, class token and registers at some layers of a frozen model.

    The model itself is changed: its parameters no longer require gradients, it is set to evaluation mode (also before
    each call, in case it was switched to training mode), and models that compute maps (B, C, H, W) are converted to
    channels-last. Tokens have no gradients; they are computed without `inference_mode`, whose tensors could not be used
    to train heads.

    The tokens before the patches are those that the model states (`num_prefix_tokens`, `has_class_token`): first the
    class token; all others (registers, a distillation token) are treated as registers. Layers of models that add the
    class token later (CaiT, XCiT, VOLO) have none. A map is flattened to tokens row by row.

    Args:
        model: A model such as `timm.create_model(name, pretrained=True)`; its head is not used. Models of torchvision
            and of transformers are adapted (`visionattn.adapters`).
        layers: Indices of the model's layers or stages, in the requested order; -1 is the last. None: the last.
        norm: Read the input of the model's head, as in `forward_features`: the last layer after the final norm, and
            after the final convolution if there is one (EfficientNet); a ViT's other layers after the final norm too.
            False: read the raw outputs of layers.
        image_size: Height and width of the images in pixels, or the side of square images.
        autocast: Compute in bfloat16 or float16; None: compute in the dtype of the parameters.

    Attributes:
        layers: The layers that are read, in the requested order.
        indices: Their indices in the model, from 0.
        image_size: Height and width of the images.
        channels: Number of channels of the images.
        device: Device of the model.
        memory_format: Memory format of the model.

    Raises:
        InputError: The model has no `forward_intermediates`, no such layer, no patch tokens, does not support this
            image size, or has no final norm that could be applied.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        norm: bool = True,
        *,
        image_size: int | tuple[int, int],
        autocast: torch.dtype | None = None,
    ) -> None:
        model = adapt(model)
        self.model: Any = model
        model.eval().requires_grad_(False)
        self.norm = norm
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.autocast = autocast
        self._name = model.name if isinstance(model, AdaptedModel) else type(model).__name__
        forward: Any = getattr(model, "forward_intermediates", None)
        if forward is None:
            raise InputError(
                f"{self._name} cannot be probed: it has no forward_intermediates, as timm's classification models do. "
                "Use Backbone.from_callable for any other function."
            )
        weights = itertools.chain(model.parameters(), model.buffers())
        first = next((weight for weight in weights if weight.is_floating_point()), None)
        if first is None:
            raise InputError(f"{self._name} cannot be probed: it has no weights.")
        self.device, self.dtype = first.device, first.dtype
        accepted = inspect.signature(forward).parameters
        # Some models raise an error when asked for prefix tokens that they do not have.
        self._prefix = getattr(model, "num_prefix_tokens", 0) if "return_prefix_tokens" in accepted else 0
        self._options = {"return_prefix_tokens": True} if self._prefix else {}
        self._stops_early = "stop_early" in accepted
        self._try_out(layers)

    @classmethod
    def from_callable(
        cls,
        function: Callable[[Tensor], Any],
        *,
        image_size: int,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        class_token: bool = False,
        registers: int = 0,
        device: str | torch.device = "cpu",
        name: str | None = None,
    ) -> Backbone:
        """Create a backbone with one layer from any function of images (B, C, H, W).

        The function returns features (B, D), a map (B, D, H, W), or tokens (B, N, D): a class token and registers, if
        there are any, followed by the patches, row by row.

        Args:
            function: A module, or another callable; its output, a tensor or an array, has no gradient.
            image_size: Side of the images.
            mean: Mean of the normalisation per channel; by default ImageNet's.
            std: Standard deviation of the normalisation per channel; by default ImageNet's.
            class_token: Whether the first token is a class token.
            registers: Number of tokens after it that are not patches.
            device: Device of the images, for a function that is not a module.
            name: Name in reports; by default that of the function.

        Raises:
            InputError: The function returns something else.
        """
        model = FunctionModel(
            function,
            image_size=image_size,
            mean=mean,
            std=std,
            class_token=class_token,
            registers=registers,
            device=device,
            name=name,
        )
        return cls(model, image_size=image_size)

    def _try_out(self, layers: Sequence[int] | None) -> None:
        """Find layers, widths and grids from one black image."""
        channels = next((m.in_channels for m in self.model.modules() if isinstance(m, nn.Conv2d)), 3)
        if isinstance(self.model, AdaptedModel):
            channels = self.model.in_chans
        # A stem that folds pixels into channels hides the number of image channels; assume 3.
        self.channels = channels if channels in (1, 3, 4) else 3
        try:
            image = torch.zeros(1, self.channels, *self.image_size, device=self.device, dtype=self.dtype)
            everything = self._run(image, None, "NCHW")[1]
        except Exception as error:
            hint = " Try norm=False." if self.norm and "norm" in str(error) else ""
            raise InputError(
                f"{self._name} returns no layers for images of {self.image_size[0]} x {self.image_size[1]} pixels: "
                f"{shorten(error, 300).rstrip('.')}.{hint}"
            ) from error
        count = len(everything)
        if layers is None:
            layers = [-1]
        if not layers or any(not -count <= index < count for index in layers):
            raise InputError(f"layers of {self._name} must be from 0 to {count - 1}; got {list(layers)}.")
        self.indices = [index % count for index in layers]
        self._unique = sorted(set(self.indices))
        self._reads_end = self.norm and count - 1 in self._unique
        try:
            self._run(image, self._unique, "NLC")
            self._format, self.memory_format = "NLC", torch.contiguous_format
        except AssertionError:  # raised by timm for an unsupported format
            self._format, self.memory_format = "NCHW", torch.channels_last
        self.model.to(memory_format=self.memory_format)
        self.layers = self._describe(image, count)

    def _describe(self, image: Tensor, count: int) -> tuple[Layer, ...]:
        final, outputs = self._run(image, self._unique, "NCHW")
        found = {}
        info = getattr(self.model, "feature_info", None) or []
        names = [level["module"] for level in info] if len(info) == count else [f"layer {i}" for i in range(count)]
        has_class = getattr(self.model, "has_class_token", getattr(self.model, "cls_token", None) is not None)
        has_class = has_class and self._prefix > 0
        for index, output in zip(self._unique, outputs):
            maps, prefix = output if self._prefix else (output, None)
            if index == count - 1 and final is not None:
                maps = final
            if maps.ndim != 4:
                raise InputError(
                    f"{self._name} has no patch tokens at layer {index}; its shape is {tuple(maps.shape)}."
                )
            if prefix is not None and prefix.shape[1] != self._prefix:
                raise InputError(f"{self._name} states {self._prefix} prefix tokens but returns {prefix.shape[1]}.")
            grid = (maps.shape[2], maps.shape[3])
            found[index] = Layer(names[index], maps.shape[1], grid, has_class, self._prefix - has_class)
        self._reads_end = final is not None
        return tuple(found[index] for index in self.indices)

    def _run(self, images: Tensor, indices: list[int] | None, layout: str) -> tuple[Tensor | None, list[Any]]:
        """Outputs of the layers, and the map of `forward_features` if it differs from that of the last layer."""
        reads_end = indices is not None and self._reads_end
        options = {**self._options, "intermediates_only": not reads_end}
        if self._stops_early and not reads_end:
            options["stop_early"] = True
        precision = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with torch.no_grad(), precision:
            result = self.model.forward_intermediates(
                images, indices=indices, norm=self.norm, output_fmt=layout, **options
            )
        if not reads_end:
            return None, result
        final, outputs = result
        # In formats other than channels-first maps, the final norm was already applied to the last layer.
        is_map = (
            isinstance(final, Tensor) and final.ndim == 4 and str(getattr(self.model, "output_fmt", "NCHW")) == "NCHW"
        )
        return (final if is_map else None), outputs

    def __call__(self, images: Tensor) -> list[Tokens]:
        """Compute the tokens of images, one entry per layer of `layers`.

        Args:
            images: Images with the model's normalisation, (B, 3, H, W), on any device.

        Returns:
            Tokens on the model's device, in the dtype of its computation.

        Raises:
            InputError: The images have another size than `image_size`.
        """
        if images.ndim != 4 or tuple(images.shape[2:]) != self.image_size:
            raise InputError(
                f"images must have shape (B, C, {self.image_size[0]}, {self.image_size[1]}) for this backbone; "
                f"got {tuple(images.shape)}."
            )
        self.model.eval()
        images = images.to(self.device, self.dtype, non_blocking=True).contiguous(memory_format=self.memory_format)
        final, outputs = self._run(images, self._unique, self._format)
        found = dict(zip(self._unique, outputs))
        if final is not None:
            last = self._unique[-1]
            found[last] = (final, found[last][1]) if self._prefix else final
        return [self._split(found[index], layer) for index, layer in zip(self.indices, self.layers)]

    def _split(self, output: Any, layer: Layer) -> Tokens:
        patches, prefix = output if self._prefix else (output, None)
        if patches.ndim == 4:
            patches = patches.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, N, D)
        if prefix is None:
            return Tokens(patches)
        return Tokens(
            patches,
            prefix[:, 0] if layer.has_class else None,
            prefix[:, int(layer.has_class) :] if layer.num_registers else None,
        )


def make_backbone(
    model: nn.Module, layers: str | Sequence[int], image_size: int | tuple[int, int], device: str
) -> Backbone:
    """Put a model on a device, and select layers: "last", "all" or indices.

    Raises:
        InputError: The model cannot be probed at this image size.
    """
    place = torch.device(device)
    model = model.to(place)
    options: dict[str, Any] = {"image_size": image_size, "autocast": torch.bfloat16 if place.type == "cuda" else None}
    if layers == "last":
        return Backbone(model, None, **options)
    if layers == "all":
        return Backbone(model, range(Backbone(model, None, **options).indices[0] + 1), **options)
    return Backbone(model, [int(index) for index in layers], **options)
