"""SPAN files of ncnn, a pair of .param and .bin, as weights in the authors' fused layout."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visionattn.errors import CheckpointError

__all__ = ["RGB_MEAN", "read_ncnn"]

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training images, as in the authors' code
HALF = 0x01306B47  # tag of weights in float16; that of float32 is 0


def read_ncnn(path: str | Path) -> dict[str, Tensor]:
    """Read a fused SPAN from ncnn's pair of files.

    The .param file lists the layers, one per line. The .bin file has their values in that order: for a constant, its
    values in float32; for a convolution, a tag of four bytes, the weights in float16 (padded to four bytes) or float32
    according to the tag, and the bias in float32.

    Args:
        path: Either file; the other one has the same name in the same folder.

    Returns:
        Weights in the authors' fused layout, float32.

    Raises:
        CheckpointError: A file is missing, damaged, or contains something else.
    """
    graph, numbers = Path(path).with_suffix(".param"), Path(path).with_suffix(".bin")
    for file in (graph, numbers):
        if not file.is_file():
            raise CheckpointError(f"There is no file {file}: ncnn stores a network in a .param and a .bin file.")
    try:
        lines = [line.split() for line in graph.read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{graph} is not a network of ncnn in text form.") from error
    if not lines or lines[0] != ["7767517"]:
        raise CheckpointError(f"{graph} is not a network of ncnn in text form.")
    data, offset, state = numbers.read_bytes(), 0, {}
    means: list[np.ndarray] = []

    def take(count: int, kind: str) -> np.ndarray:
        nonlocal offset
        values = np.frombuffer(data, kind, count, offset)
        offset += 4 * math.ceil(values.nbytes / 4)
        return values

    try:
        for words in lines[2:]:
            options = dict(word.split("=", 1) for word in words if re.fullmatch(r"-?\d+=\S+", word))
            if words[0] == "MemoryData":
                means.append(take(math.prod(int(options.get(key, 0)) or 1 for key in ("0", "1", "11", "2")), "<f4"))
            elif words[0] in ("Convolution", "ConvolutionDepthWise"):
                outputs, side, size = int(options["0"]), int(options["1"]), int(options["6"])
                tag = int(take(1, "<u4")[0])
                if tag not in (0, HALF):
                    raise CheckpointError(f"{numbers} holds weights with the unknown tag {tag:#x}.")
                weight = take(size, "<f2" if tag else "<f4").astype(np.float32)
                layer = _torch_layer(words[1])
                state[f"{layer}.weight"] = torch.from_numpy(weight.reshape(outputs, -1, side, side).copy())
                if options.get("5") == "1":
                    state[f"{layer}.bias"] = torch.from_numpy(take(outputs, "<f4").copy())
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{numbers} does not match {graph}: {error}") from error
    if offset != len(data):
        raise CheckpointError(f"{numbers} has {len(data)} bytes; {graph} requires {offset}.")
    if not means:
        state["no_norm"] = torch.zeros(1)
    elif len(means) > 1 or means[0].shape != (3,) or not np.allclose(means[0], RGB_MEAN, atol=1e-4):
        told = ", ".join(f"{value:.4g}" for value in means[0][:4])
        raise CheckpointError(f"{graph} subtracts a mean of {told}; SPAN's is {RGB_MEAN}.")
    return state


def _torch_layer(name: str) -> str:
    """`/upsampler/upsampler.0/Conv` -> `upsampler.0`."""
    steps = name.strip("/").removesuffix("/Conv").split("/")
    kept = [step for step, after in zip(steps, [*steps[1:], ""]) if not after.startswith(f"{step}.")]
    return ".".join(kept)
