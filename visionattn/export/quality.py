"""Quality and speed of a variant compared with its float32 file, on real data, by the metric of its task.

| task | metric | allowed loss |
| --- | --- | --- |
| classify with classes | accuracy | 0.5 points |
| classify without | fraction of equal top-1 classes | 1 point |
| features, with classes | mAP, each image against all others | 0.2 points |
| features | mean cosine with the float32 file's | 0.0002 |
| stereo with ground truth | bad-2 of the left view | 0.1 points |
| stereo without | fraction of pixels more than 2 pixels from the float32 file's disparity | 1 point |
| restore | PSNR on Y | 0.06 dB |
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visionattn.errors import ExportError, require, shorten
from visionattn.export.fitting import Example, feeds
from visionattn.export.spec import ExportSpec
from visionattn.metrics.luma import psnr_y, to_uint8
from visionattn.metrics.matching import disparity_errors
from visionattn.metrics.ranking import rank

__all__ = ["Quality", "Reference", "Runner", "measure_change", "measure_quality", "measure_speed"]

PAIRS, SECONDS = 25, 5.0  # maximum number of runs of each file in a speed comparison, and maximum time


@dataclass(frozen=True)
class Quality:
    """A metric of the float32 file and of a variant.

    Attributes:
        metric: Its name and unit.
        reference: Value of the float32 file.
        value: Value of the variant.
        loss: How much worse the variant is; negative if it is better.
        allowed: Largest accepted loss.
        count: Number of examples.
    """

    metric: str
    reference: float
    value: float
    loss: float
    allowed: float
    count: int

    @property
    def passed(self) -> bool:
        """Whether the loss is accepted; NaN is not."""
        return self.loss <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.reference:.5g} -> {self.value:.5g}, loss {self.loss:.2g} of {self.allowed:.2g} "
            f"allowed, {self.count} examples"
        )


class Runner:
    """Runs a file in ONNX Runtime with one thread.

    Args:
        path: An exported file or variant.
        spec: Its metadata.

    Raises:
        ExportError: ONNX Runtime cannot load it.
    """

    def __init__(self, path: str | Path, spec: ExportSpec) -> None:
        onnxruntime = require("onnxruntime", "export")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.spec = spec
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # ONNX Runtime's exceptions share no base class but Exception.
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot load the variant: {shorten(error, 300)}") from error

    def __call__(self, example: Example) -> np.ndarray:
        """The first output for an example, without the batch axis.

        Raises:
            ExportError: ONNX Runtime cannot run it.
        """
        return self.run(feeds(self.spec, example))[0]

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The first output for inputs by name.

        Raises:
            ExportError: ONNX Runtime cannot run it.
        """
        try:
            return self.session.run(self.spec.output_names[:1], inputs)[0]
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot run the variant: {shorten(error, 300)}") from error


class Reference:
    """The float32 file that variants are compared with, and its outputs for real data.

    Args:
        path: The file.
        spec: Its metadata.
        examples: Real data.

    Raises:
        ExportError: ONNX Runtime cannot load or run it.
    """

    def __init__(self, path: Path, spec: ExportSpec, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.bytes = path.stat().st_size
        self.runner = Runner(path, spec)
        self.outputs = [self.runner(example) for example in examples]
        self.quality = measure_quality(spec, examples, self.outputs, self.outputs)

    def compare(self, path: Path, spec: ExportSpec) -> tuple[Quality, float, float]:
        """Quality, speed and its spread (see `measure_speed`) of a variant; a speed of 0 if its quality is refused.

        Raises:
            ExportError: ONNX Runtime cannot load or run it.
        """
        runner = Runner(path, spec)
        quality = measure_quality(spec, self.examples, self.outputs, [runner(example) for example in self.examples])
        if not quality.passed:
            return quality, 0.0, 0.0
        smallest = min(self.examples, key=lambda example: example.images[0].size)
        return quality, *measure_speed(self.runner, runner, smallest)


def measure_quality(
    spec: ExportSpec, examples: Sequence[Example], reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> Quality:
    """Compare a variant's outputs with those of the float32 file (metrics: see the module).

    Args:
        spec: Metadata of either file.
        examples: Inputs of both files.
        reference: The float32 file's output for each example.
        outputs: The variant's output for each example.
    """
    truths = [example.truth for example in examples]
    labelled = all(truth is not None for truth in truths)
    higher = True
    if spec.task == "stereo":
        # Without ground truth, the float32 file's disparity serves as such.
        metric, allowed, higher = ("bad-2 in %", 0.1, False) if labelled else ("moved by 2 pixels in %", 1.0, False)
        truths = truths if labelled else [output[0] for output in reference]
        before, after = (_bad_2(results, truths) for results in (reference, outputs))
    elif spec.task == "classify" and spec.num_classes:
        metric, allowed = ("accuracy in %", 0.5) if labelled else ("equal first classes in %", 1.0)
        targets = truths if labelled else [output.argmax() for output in reference]
        before, after = (
            100 * float(np.mean([output.argmax() == target for output, target in zip(results, targets)]))
            for results in (reference, outputs)
        )
    elif spec.task == "classify" and labelled:
        metric, allowed = "mAP in %", 0.2
        before, after = (_map(results, truths) for results in (reference, outputs))
    elif spec.task == "classify":
        metric, allowed, before = "cosine with float32", 2e-4, 1.0
        after = float(np.mean([_cosine(*both) for both in zip(reference, outputs)]))
    else:
        metric, allowed = "PSNR-Y in dB", 0.06
        before, after = (_psnr(results, truths, spec) for results in (reference, outputs))
    loss = before - after if higher else after - before
    return Quality(metric, before, after, loss, allowed, len(examples))


def measure_change(
    spec: ExportSpec, examples: Sequence[Example], reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> float:
    """Mean absolute change of the metric of each example: a gain in one does not make up for a loss in another.

    For arguments, see `measure_quality`; not for metrics that compare examples, such as mAP.
    """
    changes = [measure_quality(spec, [e], [r], [o]).loss for e, r, o in zip(examples, reference, outputs)]
    return float(np.abs(changes).mean())


def measure_speed(reference: Runner, variant: Runner, example: Example) -> tuple[float, float]:
    """Speed-up of a variant: median of paired runs, and half the interquartile range.

    It is measured in CPU time of the thread, which other programs on the machine hardly affect.
    """
    inputs = [(runner, feeds(runner.spec, example)) for runner in (reference, variant)]
    ratios: list[float] = []
    start = time.perf_counter()
    while len(ratios) < PAIRS and (len(ratios) < 4 or time.perf_counter() - start < SECONDS):
        times = []
        for runner, given in inputs[:: 1 if len(ratios) % 2 else -1]:
            begin = time.thread_time()
            runner.run(given)
            times.append(time.thread_time() - begin)
        ratios.append(times[0] / times[1] if len(ratios) % 2 else times[1] / times[0])
    low, median, high = np.quantile(ratios[1:], [0.25, 0.5, 0.75])
    return float(median), float(high - low) / 2


def _psnr(outputs: Sequence[np.ndarray], truths: Sequence[Any], spec: ExportSpec) -> float:
    values = []
    for output, truth in zip(outputs, truths):
        picture = output if output.dtype == np.uint8 else _uint8(output)
        both = [np.repeat(one, 3, axis=2) if one.shape[2] == 1 else one for one in (picture, truth)]
        values.append(psnr_y(both[0], both[1], spec.scale or 1))
    return float(np.mean(values))


def _uint8(output: np.ndarray) -> np.ndarray:
    if not np.isfinite(output).all():
        return np.zeros((*output.shape[1:], output.shape[0]), np.uint8)
    return to_uint8(torch.from_numpy(output))


def _bad_2(outputs: Sequence[np.ndarray], truths: Sequence[Any]) -> float:
    return float(np.mean([disparity_errors(output[0], truth).bad_2 for output, truth in zip(outputs, truths)]))


def _map(outputs: Sequence[np.ndarray], labels: Sequence[Any]) -> float:
    features = torch.nn.functional.normalize(torch.from_numpy(np.stack(outputs)).float().flatten(1), dim=1)
    targets = torch.tensor(labels)
    sources = torch.arange(len(targets))
    return 100 * rank(features, features, targets, targets, sources, sources).average_precision.mean().item()


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    first, second = (array.astype(np.float64).ravel() for array in (first, second))
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
