from __future__ import annotations

import io

import onnx
import pytest
import torch
from rich.console import Console

from export.toys import PooledGrid, PythonBranch, Toy
from visionattn.errors import ExportError
from visionattn.export import check_onnx, export_onnx, print_rows
from visionattn.export.check import check_sizes
from visionattn.export.spec import ExportSpec


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    return export_onnx(Toy(), tmp_path_factory.mktemp("toy") / "model.onnx", check=False).path


@pytest.mark.parametrize("model", [PythonBranch(), PooledGrid()])
def test_baked_size_is_caught_and_leaves_no_file(model, tmp_path):
    with pytest.raises(ExportError, match=r"in \d of 6 checks: logits at 32 x 32, batch 1: .*--static-size"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    # Without the check the file is written: it is the check that sees it.
    path = export_onnx(model, tmp_path / "model.onnx", check=False).path
    rows = check_onnx(model, path, sizes=[(47, 23)], tolerance=(1e9, 0))
    assert len(rows) == 2


def test_rows_state_what_was_compared(toy_file):
    rows = check_onnx(Toy(), toy_file, sizes=[(32, 32), (5, 9)], batches=(2,))
    assert [(row.output, row.batch, row.height, row.width) for row in rows] == [
        ("logits", 2, 32, 32),
        ("logits", 2, 5, 9),
    ]
    for row in rows:
        assert row.passed
        assert row.allowed == pytest.approx(1e-6 + 1e-4 * row.spread)


@pytest.mark.parametrize(("offset", "passes"), [(0.0, True), (1e-2, False), (float("nan"), False)])
def test_other_weights_are_caught(toy_file, offset, passes):
    model = Toy()
    model.conv.bias.data += offset
    if passes:
        check_onnx(model, toy_file)
    else:
        with pytest.raises(ExportError, match="in 6 of 6 checks"):
            check_onnx(model, toy_file)


class Turned(Toy):
    """Computes something else in its first calls."""

    def __init__(self, decides: bool, calls: int) -> None:
        super().__init__()
        self.decides, self.calls = decides, calls

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        self.calls -= 1
        return super().forward(image) + float(self.calls >= 0)


def test_other_images_are_tried_where_rounding_can_decide(toy_file):
    first = check_onnx(Toy(), toy_file)
    rows = check_onnx(Turned(True, 2), toy_file)
    assert [row.spread == other.spread for row, other in zip(rows, first)] == [False] * 2 + [True] * 4
    for decides, calls in ((False, 1), (True, 100)):
        with pytest.raises(ExportError, match=r"in [16] of 6 checks"):
            check_onnx(Turned(decides, calls), toy_file)


def test_output_of_zeros_proves_nothing(tmp_path):
    model = Toy()
    torch.nn.init.zeros_(model.conv.weight)
    torch.nn.init.zeros_(model.conv.bias)
    with pytest.raises(ExportError, match=r"differ by 0 only.*proves nothing"):
        export_onnx(model, tmp_path / "model.onnx")


def test_malformed_file_is_caught(toy_file, tmp_path):
    model = onnx.load(toy_file)
    model.graph.node[0].op_type = "Convolution"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_onnx(Toy(), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("native", "multiple", "minimum"),
    [
        (native, multiple, minimum)
        for native in (8, 28, 32, 224, 256)
        for multiple in (1, 8, 32)
        for minimum in (None, 1, 8, 32)
        if native % multiple == 0 and native >= max(minimum or 1, multiple)
    ],
)
def test_sizes_are_three_different_accepted_ones(native, multiple, minimum):
    model = Toy()
    model.size_multiple, model.size_minimum = multiple, minimum
    model.pretrained_cfg = {"input_size": (3, native, native)}
    spec = ExportSpec.of(model, None, None, 20, "random", None)
    sizes = check_sizes(spec)
    assert sizes[0] == (native, native)
    assert len(set(sizes)) == 3
    for size in sizes:
        spec.check_size(*size)
    if multiple == 1:
        assert all(side % window for side in sizes[1] for window in (2, 4, 7, 8, 14, 16))


def test_metadata_survives_a_round_trip():
    spec = ExportSpec.of(Toy(), (40, 48), True, 20, "random", "apache-2.0")
    assert ExportSpec.from_metadata(spec.to_metadata()) == spec
    assert spec.input_size == [3, 40, 48]
    assert spec.license == "apache-2.0"


def test_table_shows_failures(toy_file):
    rows = check_onnx(Toy(), toy_file, sizes=[(8, 8)])
    stream = io.StringIO()
    print_rows(rows, Console(file=stream, width=100))
    assert stream.getvalue().count("pass") == 2
    assert "no other was checked" in stream.getvalue()
