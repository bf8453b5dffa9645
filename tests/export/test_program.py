from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.export import toys
from visionattn.errors import ExportError
from visionattn.export.program import write_program


def test_a_program_holds_no_operator_of_this_package(tmp_path):
    file = write_program(toys.Gated(), tmp_path / "gated.pt2", weights="drawn")
    assert all(row.passed for row in file.rows)
    assert len({(row.height, row.width) for row in file.rows}) == 3
    extra = {"visionattn.json": ""}
    program = torch.export.load(tmp_path / "gated.pt2", extra_files=extra)
    assert not [node for node in program.graph.nodes if "visionattn" in str(node.target)]
    assert json.loads(extra["visionattn.json"])["weights"] == "drawn"
    images = torch.rand(5, 3, 20, 44)
    torch.testing.assert_close(program.module()(images), toys.Gated()(images))


def test_a_wrong_program_is_not_written(tmp_path, monkeypatch):
    trace = "visionattn.export.write.trace_graph"
    wrong = torch.export.export(nn.Sequential(toys.Toy(), nn.ReLU()), (torch.rand(2, 3, 32, 32),),
                                dynamic_shapes=({0: torch.export.Dim.AUTO},))  # fmt: skip
    monkeypatch.setattr(trace, lambda *_: wrong)
    with pytest.raises(ExportError, match="differ from those of the model"):
        write_program(toys.Toy(), tmp_path / "toy.pt2", dynamic_size=False)
    assert not list(tmp_path.iterdir())
