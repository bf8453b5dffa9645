"""Int8 quantisation: unsigned 8-bit activations, signed 8-bit weights with one scale per output channel.

Static, if most weights belong to convolutions, and for stereo: activation ranges come from calibration images, and
convolutions (for stereo, also matrix products with weights) compute in int8. Dynamic otherwise, as for vision
transformers: ranges are computed from each input, and matrix products with weights compute in int8. Everything else
stays in float, such as the positions of a bilinear softmax, products of two activations, and normalisation. For stereo,
so does every layer that reads a concatenation, also after normalisation: it concatenates features with disparities,
whose range depends on the scene, and one scale for both would lose the features. The weights of layers in float are
stored as float16 there.

Nodes whose quantisation costs most (squared change of the output per weight) are left in float one after the other,
until the loss on the calibration examples is half of the allowed loss; the other half is a margin for unseen images.
For stereo, it is the mean absolute change of the error in each scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.errors import ExportError, require
from visionattn.export.fitting import Example, feeds
from visionattn.export.formats import quiet
from visionattn.export.half import halve_weights
from visionattn.export.quality import Quality, Runner, measure_change, measure_quality
from visionattn.export.spec import ExportSpec

__all__ = ["Quantized", "quantize"]

_PROBES = 2  # number of examples, the smallest, used to rank nodes
_MOST_KEPT = 0.5  # largest fraction of nodes that may stay in float
_GROWTH = 1.5  # factor of the number of nodes in float from one attempt to the next


@dataclass(frozen=True)
class Quantized:
    """An int8 graph.

    Attributes:
        model: The graph, an `onnx.ModelProto`.
        kept: Names of the weights that stay in float.
        quality: Quality on the calibration examples.
    """

    model: Any
    kept: tuple[str, ...]
    quality: Quality


def quantize(
    source: Path,
    spec: ExportSpec,
    examples: Sequence[Example],
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> Quantized:
    """Quantise a float32 file, leaving those nodes in float that lose too much.

    Args:
        source: The file.
        spec: Its metadata.
        examples: Examples for calibration and for the choice of nodes.
        folder: Folder for temporary files.
        progress: Called with a line at the start of each step.

    Raises:
        ExportError: There is nothing to quantise, or ONNX Runtime fails on the graph.
    """
    builder = _Static if _is_static(source, spec) else _Dynamic
    with quiet():
        made = builder(source, spec, examples, folder)
    return _choose(made, source, spec, examples, folder, progress)


def _choose(
    made: _Static | _Dynamic,
    source: Path,
    spec: ExportSpec,
    examples: Sequence[Example],
    folder: Path,
    progress: Callable[[str], None],
) -> Quantized:
    attempt = folder / "attempt.onnx"

    def outputs(path: Path, chosen: Sequence[Example]) -> list[np.ndarray]:
        runner = Runner(path, spec)
        return [runner(example) for example in chosen]

    def built(nodes: Sequence[str]) -> Any:
        with quiet():
            model = made.build(nodes)
        attempt.write_bytes(model.SerializeToString())
        return model

    names = list(made.nodes)
    reference = outputs(source, examples)
    ranked: list[str] = []
    count = 0
    while True:
        kept = ranked[:count]
        model = built([name for name in names if name not in kept])
        results = outputs(attempt, examples)
        quality = measure_quality(spec, examples, reference, results)
        # The exporter renames weights that it transposes: use the node's name instead.
        weights = tuple(weight if "." in (weight := made.nodes[name][0]) else name for name in kept)
        progress(f"Int8 with {count} of {len(names)} nodes in float: {quality}.")
        loss = measure_change(spec, examples, reference, results) if spec.task == "stereo" else quality.loss
        if loss <= quality.allowed / 2:
            return Quantized(model, weights, quality)
        count = max(count + 1, int(count * _GROWTH))
        if count > _MOST_KEPT * len(names):
            return Quantized(model, weights, quality)
        if not ranked:
            progress(f"Measuring the loss caused by each of {len(names)} nodes.")
            damage = {}
            probes = sorted(range(len(examples)), key=lambda place: examples[place].images[0].size)[:_PROBES]
            for name in names:
                built([name])
                results = outputs(attempt, [examples[place] for place in probes])
                distance = _distance([reference[place] for place in probes], results)
                damage[name] = distance / made.nodes[name][1]
            ranked = sorted(names, key=lambda name: -damage[name])


def _distance(reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> float:
    """Mean squared difference, infinite if it is NaN."""
    differences = [np.square(one.astype(np.float64) - other).mean() for one, other in zip(reference, outputs)]
    return float(np.nan_to_num(np.mean(differences), nan=np.inf))


def _weights(model: Any) -> dict[str, dict[str, tuple[str, int]]]:
    """For convolutions and products with weights: node name -> name of the weight and its number of elements."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    found: dict[str, dict[str, tuple[str, int]]] = {"Conv": {}, "MatMul": {}, "Gemm": {}}
    for node in model.graph.node:
        if node.op_type in found and node.input[1] in sizes:
            found[node.op_type][node.name] = node.input[1], sizes[node.input[1]]
    return found


def _readers_of_concatenations(model: Any) -> set[str]:
    """Names of the nodes whose first input is a concatenation, or a layer norm of one."""
    producers = {output: node for node in model.graph.node for output in node.output}

    def mixed(name: str) -> bool:
        producer = producers.get(name)
        if producer is not None and producer.op_type == "LayerNormalization":
            producer = producers.get(producer.input[0])
        return producer is not None and producer.op_type == "Concat"

    return {node.name for node in model.graph.node if node.input and mixed(node.input[0])}


def _is_static(source: Path, spec: ExportSpec) -> bool:
    if spec.task == "stereo":
        return True
    found = _weights(require("onnx", "export").load(source))
    convolutions, products = (
        sum(size for kind in kinds for _, size in found[kind].values()) for kinds in (("Conv",), ("MatMul", "Gemm"))
    )
    return convolutions >= products


class _Dynamic:
    """Builds graphs whose products with weights are int8, with ranges computed from each input.

    Attributes:
        nodes: Nodes that can be quantised: node name -> name of its weight, its number of elements.
    """

    kinds = ("MatMul", "Gemm")

    def __init__(self, source: Path, spec: ExportSpec, examples: Sequence[Example], folder: Path) -> None:
        onnx = require("onnx", "export")
        self.source = source
        self.target = folder / "dynamic.onnx"
        found = _weights(onnx.load(source))
        self.nodes = {name: weight for kind in self.kinds for name, weight in found[kind].items()}
        if not self.nodes:
            raise ExportError(f"{spec.model} has no products with weights: there is nothing to compute in int8.")

    def build(self, nodes: Sequence[str]) -> Any:
        """The graph in which these nodes are int8."""
        onnx, quantization = require("onnx", "export"), require("onnxruntime.quantization", "export")
        quantization.quantize_dynamic(
            self.source,
            self.target,
            op_types_to_quantize=list(self.kinds),
            nodes_to_quantize=list(nodes),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(self.target)


class _Static:
    """Builds graphs whose convolutions (for stereo, also products with weights) are int8, with calibrated ranges.

    Attributes:
        nodes: Nodes that can be quantised: node name -> name of its weight, its number of elements.
    """

    def __init__(self, source: Path, spec: ExportSpec, examples: Sequence[Example], folder: Path) -> None:
        calibrate = require("onnxruntime.quantization.calibrate", "export")
        utilities = require("onnxruntime.quantization.quant_utils", "export")
        self.stereo = spec.task == "stereo"
        self.kinds = ("Conv", "MatMul") if self.stereo else ("Conv",)
        self.model = utilities.load_model_with_shape_infer(source)
        found = _weights(self.model)
        mixed = _readers_of_concatenations(self.model) if self.stereo else set()
        self.nodes = {name: weight for kind in self.kinds for name, weight in found[kind].items() if name not in mixed}
        if not self.nodes:
            raise ExportError(f"{spec.model} has no convolutions: there is nothing to compute in int8.")
        calibrator = calibrate.create_calibrator(
            source, list(self.kinds), str(folder / "augmented.onnx"), calibrate.CalibrationMethod.MinMax
        )
        # One at a time: otherwise the calibrator would keep the activations of all examples.
        for example in examples:
            calibrator.collect_data(_reader(feeds(spec, example)))
        self.ranges = calibrator.compute_data()

    def build(self, nodes: Sequence[str]) -> Any:
        """The graph in which these nodes are int8."""
        onnx, quantization = require("onnx", "export"), require("onnxruntime.quantization", "export")
        quantizer = require("onnxruntime.quantization.qdq_quantizer", "export").QDQQuantizer
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        made = quantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QUInt8,
            tensors_range=self.ranges,
            nodes_to_quantize=list(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=list(self.kinds),
            extra_options={},
        )
        made.quantize_model()
        if self.stereo:
            halve_weights(made.model.model)
        return made.model.model


def _reader(inputs: dict[str, np.ndarray]) -> Any:
    """A reader for the calibrator that yields these inputs once."""
    left = [inputs]
    base = require("onnxruntime.quantization", "export").CalibrationDataReader
    return type("Reader", (base,), {"get_next": lambda self: left.pop() if left else None})()
