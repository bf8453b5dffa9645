"""Halo attention in exported graphs: the definition's values at any size, without what some runtimes cannot take."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visionattn.kernels import PlainForms, decompositions
from visionattn.kernels._plain.exported_halo_attention import halo_attention_exported
from visionattn.kernels.halo_attention import halo_attention_definition

SHAPES = [(8, 3, 1), (8, 3, 2), (4, 0, 1), (4, 6, 2), (3, 1, 3), (1, 2, 1), (1, 0, 1)]  # block, halo, stride
SIZES = [(1, 1), (5, 17), (16, 8), (9, 3)]


def arguments(size, block, halo, stride, border, index, dtype=torch.float64, tables=3.0):
    """Heads of 4 channels, 5 of the values; relative logits larger than the others."""
    generator = torch.Generator().manual_seed(size[0] + block)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q = draw(2, 3, 4, *(-(-pixels // stride) for pixels in size))
    k, v = draw(2, 3, 4, *size), draw(2, 3, 5, *size)
    rows = 2 * (block + 2 * halo) - 1
    return q, k, v, tables * draw(rows, 4), tables * draw(rows, 4), block, halo, stride, border, index


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("border", "index"), list(product(("mask", "zero"), ("offset", "timm"))))
def test_equals_the_definition(size, border, index):
    for shape in SHAPES:
        args = arguments(size, *shape, border, index)
        torch.testing.assert_close(
            halo_attention_exported(*args), halo_attention_definition(*args), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("size", [(5, 17), (9, 3)], ids=str)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**100])
def test_keys_outside_the_map_never_win(size, scale):
    """However large the relative logit at their place, and however small those of all keys inside."""
    q, k, v, *tables, block, halo, stride, border, index = arguments(size, 4, 3, 1, "mask", "offset", torch.float32)
    # Multiples of 1/8 have logits without rounding errors, in any order of summation.
    q, k, *tables = ((x * 8).round() / 8 for x in (q, k, *tables))
    args = q, k, v, *(scale * table for table in tables), block, halo, stride, border, index
    found = halo_attention_exported(*args)
    assert found.isfinite().all()
    torch.testing.assert_close(found, halo_attention_definition(*args), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, args) -> None:
        super().__init__()
        self.height_rel, self.width_rel = nn.Parameter(args[3]), nn.Parameter(args[4])
        self.settings = args[5:]

    def forward(self, kv: Tensor) -> Tensor:
        k, v = kv.split([4, 5], 2)
        q = k[..., :: self.settings[2], :: self.settings[2]]
        return torch.ops.visionattn.halo_attention(q, k, v, self.height_rel, self.width_rel, *self.settings)


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.axes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        self.axes = max(self.axes, result.ndim if isinstance(result, Tensor) else 0)
        return result


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_graphs_have_what_other_runtimes_execute(border):
    """At most five axes, no bitwise operators and no identity matrix."""
    args = arguments((9, 11), 4, 2, 2, border, "offset")
    with PlainForms(), Watch() as watch:
        Attention(args)(torch.cat(args[1:3], 2))
    assert watch.axes == 5  # those of the operator's arguments
    refused = ("bitwise", "__or__", "aten.eye", "visionattn")
    assert not any(name in function for function in watch.names for name in refused)


def test_programs_for_other_runtimes_have_this_form():
    assert decompositions()[torch.ops.visionattn.halo_attention.default] is halo_attention_exported


@pytest.fixture(scope="module")
def session():
    """The layer as a file with dynamic axes, traced at one size."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    args = arguments((9, 11), 4, 3, 2, "mask", "offset", torch.float32)
    axes = dict.fromkeys((0, 3, 4), torch.export.Dim.DYNAMIC)
    with PlainForms():
        program = torch.export.export(Attention(args), (torch.cat(args[1:3], 2),), dynamic_shapes=(axes,))
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options), args[3:5]


@pytest.mark.parametrize("size", [(9, 11), (4, 8), (13, 30), (16, 16)], ids=str)
def test_one_file_takes_all_sizes(session, size):
    session, tables = session
    args = arguments(size, 4, 3, 2, "mask", "offset", torch.float32)
    k, v = args[1:3]
    found = session.run(None, {session.get_inputs()[0].name: torch.cat((k, v), 2).numpy()})[0]
    expected = halo_attention_definition(k[..., ::2, ::2], k, v, *tables, *args[5:])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
