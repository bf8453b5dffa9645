"""What concerns all operators at once: each has a contract, and each is left out on devices that cannot run it."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels.contract import OperatorContract
from visionattn.kernels import _operator, decompositions, kernels_enabled
from visionattn.kernels.symmetric_gate import symmetric_gate_definition


def operators() -> set[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("visionattn::"))
    return {operator for _, operator in names}


def test_every_operator_has_a_contract():
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.kernels.{path.stem}")
    covered = {test.name for test in OperatorContract.__subclasses__()}
    assert operators() == covered | {f"{name}_backward" for name in covered}


def test_every_forward_operator_has_a_definition():
    forward = {operator for operator in operators() if not operator.endswith("_backward")}
    assert {operator._schema.name.split("::")[1] for operator in decompositions()} == forward


def test_compiled_kernels_keep_everything_in_registers():
    with (Path(__file__).parents[2] / "results" / "kernel_resources.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max((row["triton"] for row in rows), key=lambda version: [int(part) for part in version.split(".")])
    kernels = [row for row in rows if row["triton"] == newest]
    assert {row["device"].split(",")[0] for row in kernels} == {"sm_80", "sm_90", "sm_100"}
    assert [row for row in kernels if row["stack"] != "0" or row["local"] != "0"] == []


@pytest.mark.parametrize("way", ["compiled", "linearized"])
def test_transforms_inside_of_traces(way):
    """The rule is one for all operators, and tracing takes seconds."""
    primals, tangents = (tuple(torch.randn(2, 3, dtype=torch.float64) for _ in "hx") for _ in range(2))
    function, expected = (
        torch.ops.visionattn.symmetric_gate,
        torch.func.jvp(symmetric_gate_definition, primals, tangents),
    )
    if way == "compiled":
        compiled = torch.compile(lambda *args: torch.func.jvp(function, *args), fullgraph=True, backend="aot_eager")
        found = compiled(primals, tangents)
    else:
        output, push_forward = torch.func.linearize(function, *primals)
        found = output, push_forward(*tangents)
    torch.testing.assert_close(found, expected)


@pytest.fixture
def fake_device(monkeypatch):
    """Pretend that CUDA devices of a given capability exist, with or without Triton."""

    def pretend(capability=(9, 0), triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.delenv("VISIONATTN_KERNELS", raising=False)
        _operator._runs_triton.cache_clear()
        return torch.device("cuda", 0)

    yield pretend
    _operator._runs_triton.cache_clear()


def test_kernels_run_from_sm_80_on(fake_device):
    assert kernels_enabled(fake_device((8, 0)))
    assert not kernels_enabled(fake_device((7, 5)))
    assert not kernels_enabled(torch.device("cpu"))


def test_kernels_need_triton(fake_device):
    assert not kernels_enabled(fake_device(triton=False))


def test_kernels_can_be_switched_off(fake_device, monkeypatch):
    device = fake_device()
    monkeypatch.setenv("VISIONATTN_KERNELS", "0")
    assert not kernels_enabled(device)
    monkeypatch.setenv("VISIONATTN_KERNELS", "1")
    assert kernels_enabled(device)
