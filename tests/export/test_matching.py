from __future__ import annotations

import contextlib
import functools
import sys

import onnx
import onnxscript.optimizer
import pytest
from onnxscript.rewriter.pattern import SimplePatternMatcher

from tests.export.clock import Clock
from tests.export.toys import Gated
from visionattn.errors import ExportError
from visionattn.export import export_onnx
from visionattn.export.budget import Budget
from visionattn.export.matching import first_node_first

# Two slices that are one split, in the order in which the optimizer finds it, and one that is not.
HALVES = """
<ir_version: 9, opset_import: ["" : 20]>
halves (float[3, 8] x) => (float[3, 4] y)
<int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] six = {6},
 int64[1] eight = {8}, int64[1] last = {-1}>
{
    r = Relu(x)
    high = Slice(r, four, eight, last)
    low = Slice(r, zero, four, last)
    middle = Slice(r, two, six, last)
    product = Mul(low, high)
    y = Add(product, middle)
}
"""


@pytest.fixture
def searched(monkeypatch):
    """The operations at which patterns with several last nodes were searched."""
    operations, match = [], SimplePatternMatcher.match

    def counted(self, model, graph, node, **options):
        if len(self.pattern.output_nodes) > 1:
            operations.append(node.op_type)
        return match(self, model, graph, node, **options)

    monkeypatch.setattr(SimplePatternMatcher, "match", counted)
    return operations


def test_patterns_of_several_nodes_are_still_found(searched):
    plain = onnxscript.optimizer.optimize(onnx.parser.parse_model(HALVES))
    everywhere = searched.copy()
    searched.clear()
    match = SimplePatternMatcher.match
    with first_node_first(Budget()):
        quick = onnxscript.optimizer.optimize(onnx.parser.parse_model(HALVES))
    assert SimplePatternMatcher.match is match
    assert quick.SerializeToString() == plain.SerializeToString()
    assert set(searched) == {"Slice"}
    assert {"Slice", "Relu", "Mul", "Add"} <= set(everywhere)
    kinds = sorted(node.op_type for node in quick.graph.node)
    if "Split" not in kinds:
        pytest.skip("this version of onnxscript does not join these slices")
    assert kinds == ["Add", "Mul", "Relu", "Slice", "Split"]


def test_the_exported_file_is_the_same(searched, tmp_path, monkeypatch):
    export_onnx(Gated(), tmp_path / "quick.onnx", check=False)
    assert set(searched) <= {"Slice"}
    monkeypatch.setattr("visionattn.export.translate.first_node_first", contextlib.nullcontext)
    export_onnx(Gated(), tmp_path / "plain.onnx", check=False)
    assert "Conv" in searched
    assert (tmp_path / "quick.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_an_optimizer_without_the_class_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter.pattern", None)  # an import fails
    match = SimplePatternMatcher.match
    with first_node_first(Budget()):
        assert SimplePatternMatcher.match is match


def test_the_time_limit_ends_translating(tmp_path, monkeypatch):
    clock, match = Clock(), SimplePatternMatcher.match

    def slow(self, model, graph, node, **options):
        clock.seconds += 1
        return match(self, model, graph, node, **options)

    monkeypatch.setattr(SimplePatternMatcher, "match", slow)
    monkeypatch.setattr("visionattn.export.write.Budget", functools.partial(Budget, clock=clock))
    with pytest.raises(ExportError) as error:
        export_onnx(Gated(), tmp_path / "model.onnx", check=False, time_limit=20)
    assert str(error.value).startswith(
        "The ONNX exporter cannot export Gated with dynamic batch, height, width. Reason: translating did not end "
        "within the limit of 20 s of CPU time for all steps; raise it with --time-limit (time_limit=)."
    )
    assert clock.seconds == 21
    assert not list(tmp_path.iterdir())
