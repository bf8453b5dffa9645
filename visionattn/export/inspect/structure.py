"""The structure of an ONNX file, read without running it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionattn.errors import InputError, require, shorten
from visionattn.export.runtime import checked_path

__all__ = ["Structure", "Value", "read_structure"]

STANDARD = ("", "ai.onnx", "ai.onnx.ml")
CHANNELS = (1, 3, 4)
_REASON = 300


@dataclass(frozen=True)
class Value:
    """An input or an output.

    Attributes:
        name: Its name.
        type: Element type, such as "float" or "uint8".
        shape: A number for each fixed axis, its name or "?" for a dynamic one; None if the rank is not known.
    """

    name: str
    type: str
    shape: list[int | str] | None

    @property
    def layout(self) -> str | None:
        """Layout "NCHW" or "NHWC" if it can be a batch of images, otherwise None."""
        if self.shape is None or len(self.shape) != 4 or self.type not in ("float", "float16", "uint8", "double"):
            return None
        if self.shape[1] in CHANNELS:
            return "NCHW"
        return "NHWC" if self.shape[3] in CHANNELS else None

    def __str__(self) -> str:
        shape = "unknown rank" if self.shape is None else " x ".join(map(str, self.shape))
        return f"{self.name}: {self.type}, {shape}"


@dataclass(frozen=True)
class Structure:
    """The structure of a file.

    Attributes:
        ir_version: IR version.
        opsets: Operator set version by domain; "" is ONNX's own domain.
        producer: Tool that wrote the file.
        inputs: Inputs, without those that have a value in the file.
        outputs: Outputs.
        nodes: Number of operators, including subgraphs.
        operators: Count of each operator, most frequent first; with its domain if that is not ONNX's own.
        custom_domains: Domains of operators outside of ONNX.
        weights: Bytes of the constants, inside and outside of the file.
        external_data: Files that contain constants.
        highest_rank: Largest number of axes of a tensor, as far as shapes can be inferred.
        fault: Message of ONNX's checker; empty if the file is valid.
    """

    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: list[Value]
    outputs: list[Value]
    nodes: int
    operators: dict[str, int]
    custom_domains: list[str]
    weights: int
    external_data: list[str]
    highest_rank: int
    fault: str


def read_structure(path: str | Path) -> tuple[Structure, dict[str, str]]:
    """Read a file's structure and its metadata.

    Args:
        path: The file.

    Raises:
        InputError: The file does not exist, is not ONNX, or lacks its external data.
    """
    onnx = require("onnx", "export")
    path = checked_path(Path(path))
    try:
        model = onnx.load(path, load_external_data=False)
        nodes = list(_nodes(model.graph))
        if not nodes or not model.graph.output:
            raise ValueError("it contains no graph")
    # Protobuf's parsers raise several types of exceptions.
    except Exception as error:
        raise InputError(
            f"{shorten(path)} is not an ONNX file, or is truncated: {shorten(error).rstrip('.')}."
        ) from error
    external = _external_data(onnx, model)
    missing = [name for name in external if not (path.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{shorten(path)} stores its weights in {shorten(missing[0])}, which is missing: put it into the same "
            "folder."
        )
    counts = Counter(_name(node) for node in nodes)
    given = {tensor.name for tensor in model.graph.initializer}
    structure = Structure(
        model.ir_version,
        {entry.domain: entry.version for entry in model.opset_import},
        " ".join(filter(None, (model.producer_name, model.producer_version))),
        [_value(onnx, value) for value in model.graph.input if value.name not in given],
        [_value(onnx, value) for value in model.graph.output],
        len(nodes),
        dict(counts.most_common()),
        sorted({node.domain for node in nodes} - set(STANDARD)),
        sum(_bytes(onnx, tensor) for tensor in model.graph.initializer),
        external,
        *_checked(onnx, path, model),
    )
    return structure, {entry.key: entry.value for entry in model.metadata_props}


def _nodes(graph: Any) -> Any:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _nodes(inner)


def _name(node: Any) -> str:
    return node.op_type if node.domain in STANDARD[:2] else f"{node.domain}.{node.op_type}"


def _value(onnx: Any, value: Any) -> Value:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return Value(value.name, value.type.WhichOneof("value") or "unknown", None)
    try:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    except ValueError:
        kind = f"type {tensor.elem_type}"
    shape: list[int | str] | None = None
    if tensor.HasField("shape"):
        shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return Value(value.name, kind, shape)


def _external_data(onnx: Any, model: Any) -> list[str]:
    found: dict[str, None] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            places = {entry.key: entry.value for entry in tensor.external_data}
            found[places.get("location", "")] = None
    return list(found)


def _bytes(onnx: Any, tensor: Any) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    try:
        return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        return 0


def _checked(onnx: Any, path: Path, model: Any) -> tuple[int, str]:
    """The highest rank, and the message of ONNX's checker."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        fault = ""
    # The checker and shape inference raise several types of exceptions, RuntimeError among them.
    except Exception as error:
        fault = shorten(error, _REASON)
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:
        graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    ranks = [len(value.type.tensor_type.shape.dim) for value in values]
    return max([*ranks, *(len(tensor.dims) for tensor in graph.initializer)], default=0), fault
