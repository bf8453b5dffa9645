"""Metadata of an exported file: enough to prepare its inputs without this package.

A model class states what its `pretrained_cfg` does not contain; each attribute is optional:

    task            what the model does                    default: "classify"
    input_names     one name per image input               default: ("image",)
    output_names    one name per output                    default: ("logits",), without classes ("features",)
    size_multiple   height and width are multiples of it   default: 1
    size_minimum    smallest height and width              default: the cfg's `min_input_size`, else not stated
    scale           ratio of output to input size          default: not stated
    radius          input pixels around its position that an output pixel depends on: the overlap that tiles need
    attributes      names of the attributes that it embeds an image by       default: not stated
    decides         whether it makes discrete decisions that rounding can flip, such as the largest of many scores; the
                    check of a file then tries other images if outputs differ   default: False
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timm.models import get_model_input_config
from torch import nn

import visionattn
from visionattn.errors import InputError, shorten
from visionattn.files import violation

__all__ = ["ExportSpec", "size_text"]


_JSON = {
    "str": str,
    "int": int,
    "float": (int, float),
    "list[str]": [str],
    "list[int]": [int],
    "list[float]": [(int, float)],
}
_CHOICES = {
    "input_layout": ("NCHW", "NHWC"),
    "input_type": ("float32", "uint8"),
    "precision": ("fp32", "fp16", "int8"),
    "output_kind": ("logits", "features", "probabilities", "image", "disparity", "flow"),
}
_IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}
_AXES = {"tokens": {0: "batch", 1: "tokens"}, "conditions": {0: "conditions"}}  # of the inputs that are not images
_LARGEST = 2**31  # bound for sizes, numbers of pixels and numbers of images


def size_text(height: int, width: int) -> str:
    """Format a size for messages."""
    return f"{height} x {width}"


@dataclass(frozen=True)
class ExportSpec:
    """The metadata of an exported file. Each field is one key of the file's `metadata_props`; None is left out.

    Strings are written unchanged, everything else as JSON.
    """

    model: str
    task: str
    input_names: list[str]
    output_names: list[str]
    input_size: list[int]  # (C, H, W); H and W are examples if they are dynamic
    dynamic_axes: list[str]
    batch: int | None  # fixed batch size
    size_multiple: int
    size_minimum: int | None
    scale: int | None
    radius: int | None
    input_layout: str
    input_order: str
    input_range: list[float]  # before mean and std: x = (image - mean) / std
    mean: list[float] | None
    std: list[float] | None
    interpolation: str | None
    crop_pct: float | None
    crop_mode: str | None
    num_classes: int
    labels: list[str] | None
    attributes: list[str] | None
    pair: str | None  # equal in files that only work together
    weights: str
    license: str
    opset: int
    visionattn: str
    input_type: str | None = None  # "float32" or "uint8"; if left out, the graph states the float type
    precision: str | None = None  # "fp32", "fp16" or "int8", in variants
    unchecked: list[str] | None = None  # sizes not compared with PyTorch, such as "320 x 736"; [] if all were
    output_kind: str | None = None  # output of a graph that includes preprocessing: "image", "probabilities" ...

    @classmethod
    def of(
        cls,
        model: nn.Module,
        input_size: tuple[int, int] | None,
        dynamic_size: bool | None,
        opset: int,
        weights: str,
        license: str | None,
        batch: int | None = None,
    ) -> ExportSpec:
        """Collect the metadata of a model, its class and its `pretrained_cfg` (arguments: see `export_onnx`)."""
        cfg = getattr(model, "pretrained_cfg", None) or {}
        traits = get_model_input_config(model)
        channels, *native = traits["input_size"]
        num_classes = getattr(model, "num_classes", 0)
        minimum = getattr(model, "size_minimum", None)
        if minimum is None and cfg.get("min_input_size"):
            minimum = max(cfg["min_input_size"][1:])
        multiple = getattr(model, "size_multiple", 1)
        dynamic = not traits["fixed_input_size"] if dynamic_size is None else dynamic_size
        spec = cls(
            model=cfg.get("architecture") or type(model).__name__,
            task=getattr(model, "task", "classify"),
            input_names=list(getattr(model, "input_names", ("image",))),
            output_names=list(getattr(model, "output_names", ("logits" if num_classes else "features",))),
            input_size=[channels, *(input_size or native)],
            dynamic_axes=["batch"] * (batch is None) + ["height", "width"] * dynamic,
            batch=batch,
            size_multiple=multiple,
            size_minimum=None if minimum is None else multiple * math.ceil(minimum / multiple),
            scale=_whole(model, "scale"),
            radius=_whole(model, "radius"),
            input_layout="NCHW",
            input_order={1: "grey", 3: "RGB"}.get(channels, f"{channels} channels"),
            input_range=[0.0, 1.0],
            mean=_listed(cfg.get("mean"), channels),
            std=_listed(cfg.get("std"), channels),
            interpolation=cfg.get("interpolation"),
            crop_pct=cfg.get("crop_pct"),
            crop_mode=cfg.get("crop_mode"),
            num_classes=num_classes,
            labels=_listed(cfg.get("label_names"), num_classes),
            attributes=list(getattr(model, "attributes", ())) or None,
            pair=getattr(model, "pair", None),
            weights=weights,
            license=license or "not stated",
            opset=opset,
            visionattn=visionattn.__version__,
        )
        # The model must accept the export size itself.
        spec.check_size(*spec.input_size[1:])
        return spec

    @property
    def axes(self) -> list[dict[int, str]]:
        """The names of each input's dynamic axes."""
        inputs = (_AXES.get(name, _IMAGE_AXES) for name in self.input_names)
        return [{axis: name for axis, name in names.items() if name in self.dynamic_axes} for names in inputs]

    @property
    def dynamic_size(self) -> bool:
        """Whether the file takes more than one height and width."""
        return "height" in self.dynamic_axes

    def check_batch(self, batch: int) -> None:
        """Raise `InputError` for a batch size that the file does not accept."""
        if self.batch is not None and batch != self.batch:
            raise InputError(
                f"The batch size of this file must be {self.batch}; got {batch}. Export it without --batch for any "
                "batch size."
            )

    def check_size(self, height: int, width: int) -> None:
        """Raise `InputError` for a size that the file does not accept."""
        multiple, minimum = self.size_multiple, self.size_minimum or 1
        if not self.dynamic_size and [height, width] != self.input_size[1:]:
            raise InputError(
                f"The input size of this file must be {size_text(*self.input_size[1:])}; got "
                f"{size_text(height, width)}. Resize the image, or export the model with a dynamic size."
            )
        if min(height, width) < 1:
            raise InputError(f"Height and width must be at least 1; got {size_text(height, width)}.")
        if height % multiple or width % multiple or min(height, width) < minimum:
            steps = f" and divisible by {multiple}" if multiple > 1 else ""
            raise InputError(
                f"Height and width of the input of {self.model} must be at least {minimum}{steps}; got "
                f"{size_text(height, width)}. Resize or pad the image."
            )

    def to_metadata(self) -> dict[str, str]:
        """Convert the fields to the key-value strings of an ONNX file."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {key: v if isinstance(v, str) else json.dumps(v) for key, v in values if v is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ExportSpec:
        """Parse the fields.

        Raises:
            InputError: A field is missing or invalid.
        """
        values: dict[str, Any] = {}
        schema: dict[str, Any] = {}
        for field in fields(cls):
            kind, _, optional = str(field.type).partition(" | ")
            text = metadata.get(field.name)
            if text is None and not optional:
                raise InputError(f"the entry {field.name} is missing")
            if text is not None:
                schema[field.name] = _JSON[kind]
            try:
                values[field.name] = text if text is None or kind == "str" else json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"the entry {field.name} is not JSON: {shorten(text)}") from error
        wrong = violation(values, schema)
        if wrong is None:
            spec = cls(**values)
            wrong = spec._contradiction()
        if wrong:
            raise InputError(wrong)
        return spec

    def _contradiction(self) -> str | None:
        """Describe a value that no model can have, or return None."""
        channels = self.input_size[0] if len(self.input_size) == 3 else 0
        counts = [*self.input_size, self.size_multiple, self.size_minimum, self.scale, self.batch]
        if not channels or not all(1 <= count < _LARGEST for count in counts if count is not None):
            return "sizes, their multiple and minimum, scale and batch must be whole numbers of at least 1"
        if self.radius is not None and not 0 <= self.radius < _LARGEST:
            return "the radius must be at least 0"
        if not self.input_names or not self.output_names:
            return "there must be at least one input and one output"
        for key, allowed in _CHOICES.items():
            if (value := getattr(self, key)) is not None and value not in allowed:
                return f"{key} must be one of {', '.join(map(repr, allowed))}; got {shorten(value)!r}"
        for name, numbers, count in (
            ("input_range", self.input_range, 2),
            ("mean", self.mean, channels),
            ("std", self.std, channels),
        ):
            if numbers is not None and (len(numbers) != count or not all(map(_finite, numbers))):
                return f"{name} must be {count} finite numbers"
        if self.std is not None and min(self.std) <= 0:
            return "std must be above 0"
        return None


def _finite(value: float) -> bool:
    # An int may be too large for a float.
    return abs(value) < _LARGEST


def _whole(model: nn.Module, name: str) -> int | None:
    # Other libraries' models may use these names for something else.
    value = getattr(model, name, None)
    return value if isinstance(value, int) else None


def _listed(values: Any, length: int) -> list | None:
    # Values of the cfg do not apply to a model built with other channels or classes.
    return list(values) if values and len(values) == length else None
