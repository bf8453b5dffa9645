from __future__ import annotations

import io

import onnx
import pytest
import torch
from rich.console import Console

from tests.export.toys import PooledGrid, PythonBranch, Toy
from visionattn.errors import ExportError, InputError
from visionattn.export import OnnxModel, check_onnx, export_onnx, print_rows
from visionattn.export.sizes import check_sizes
from visionattn.export.spec import ExportSpec


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    return export_onnx(Toy(), tmp_path_factory.mktemp("toy") / "model.onnx", check=False).path


@pytest.mark.parametrize("model", [PythonBranch(), PooledGrid()])
def test_baked_size_is_caught_and_leaves_no_file(model, tmp_path):
    with pytest.raises(ExportError, match=r"in 2 of [26] checks: logits at \d\d x \d\d, batch 1: .*--static-size"):
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
        assert 0 < row.allowed - (1e-6 + 1e-4 * row.spread) < 2e-6  # rounding at outputs of 1 at most


@pytest.mark.parametrize("given", [{"sizes": []}, {"batches": []}, {"batches": (1, 0)}])
def test_check_of_nothing_is_refused(toy_file, given):
    with pytest.raises(InputError, match="A check needs a size and batches of at least 1; got"):
        check_onnx(Toy(), toy_file, **given)


@pytest.mark.parametrize(("offset", "passes"), [(0.0, True), (1e-2, False), (float("nan"), False)])
def test_other_weights_are_caught(toy_file, offset, passes):
    model = Toy()
    model.conv.bias.data += offset
    if passes:
        check_onnx(model, toy_file)
    else:
        for size in check_sizes(OnnxModel(toy_file).spec):
            with pytest.raises(ExportError, match="in 2 of 2 checks"):
                check_onnx(model, toy_file, sizes=[size])


def test_the_cheapest_size_is_compared_first_and_ends_the_check_of_a_wrong_file(toy_file):
    lines, model = [], Toy()
    check_onnx(model, toy_file, sizes=[(32, 32), (5, 9), (16, 16)], progress=lines.append)
    assert [line.partition(":")[0] for line in lines] == [
        "Comparison 1 of 6, 5 x 9, batch 1",
        "Comparison 3 of 6, 16 x 16, batch 1",
        "Comparison 5 of 6, 32 x 32, batch 1",
    ]
    model.conv.bias.data += 1
    lines.clear()
    with pytest.raises(ExportError, match="in 2 of 2 checks: logits at 5 x 9"):
        check_onnx(model, toy_file, sizes=[(32, 32), (5, 9), (16, 16)], progress=lines.append)
    assert len(lines) == 1


def test_rounding_far_from_zero_is_allowed(tmp_path):
    """Outputs near 1000 have steps of 6e-5, and differ by 0.1 from image to image."""
    model = Toy()
    model.conv.bias.data += 1000
    rows = export_onnx(model, tmp_path / "model.onnx").rows
    assert max(row.spread for row in rows) < 1
    assert 1e-3 < min(row.allowed for row in rows) < max(row.allowed for row in rows) < 3e-3
    with pytest.raises(ExportError, match="differ from those of the model"):
        check_onnx(Toy(), tmp_path / "model.onnx")
    model.conv.weight.data *= 1e-2  # now the outputs of two images differ by a few of these steps
    with pytest.raises(ExportError, match=r"differ by only 0\.00\d, .*proves nothing"):
        export_onnx(model, tmp_path / "model.onnx")


class Turned(Toy):
    """Where rounding decides: an output of two numbers out of a hundred, in the first calls, is another."""

    def __init__(self, decides: bool, calls: int = 0, columns: int = 2) -> None:
        super().__init__()
        self.decides, self.calls, self.columns = decides, calls, columns
        self.output_names = ("map",)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 300)."""
        self.calls -= 1
        x = super().forward(image).repeat(1, 100)
        turned = self.calls >= 0
        return x + turned * (torch.arange(300) < self.columns)


@pytest.fixture(scope="module")
def turned_file(tmp_path_factory):
    return export_onnx(Turned(True), tmp_path_factory.mktemp("turned") / "model.onnx").path


def test_other_images_are_tried_where_rounding_can_decide(turned_file):
    first = check_onnx(Turned(True), turned_file)
    rows = check_onnx(Turned(True, calls=2, columns=30), turned_file)
    assert [row.errors == other.errors for row, other in zip(rows, first)] == [True] * 2 + [False] * 2 + [True] * 2
    for decides, calls in ((False, 1), (True, 100)):
        with pytest.raises(ExportError, match=r"in [12] of 2 checks"):
            check_onnx(Turned(decides, calls, columns=30), turned_file)


def test_a_few_decisions_may_be_turned(turned_file):
    assert all(row.error < row.allowed for row in check_onnx(Turned(True, calls=100, columns=5), turned_file))
    for decides, columns in ((False, 1), (True, 7)):  # of 300 numbers
        with pytest.raises(ExportError, match="in 2 of 2 checks"):
            check_onnx(Turned(decides, calls=100, columns=columns), turned_file)


def test_what_hangs_on_rounding_is_told(turned_file):
    """The file is right; the reference is float64, from which float32 differs."""

    computed = []

    class Opposite(Turned):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            """(B, 3, H, W) -> (B, 300)."""
            computed.append((image.dtype, len(image)))
            return super().forward(image) + (image.dtype == torch.float64)

    with pytest.raises(ExportError) as error:
        check_onnx(Opposite(True), turned_file)
    assert "The output of Turned is numerically unstable: in float32, PyTorch itself differs" in str(error.value)
    assert "error 1, allowed" in str(error.value)
    assert "PyTorch's own in float32 1." in str(error.value)
    # Four draws in float64; the first is compared with float32 too.
    assert computed == [(torch.float64, 1), (torch.float64, 3)] * 4 + [(torch.float32, 1), (torch.float32, 3)]


def test_output_of_zeros_proves_nothing(tmp_path):
    model = Toy()
    torch.nn.init.zeros_(model.conv.weight)
    torch.nn.init.zeros_(model.conv.bias)
    with pytest.raises(ExportError, match=r"differ by only 0, .*proves nothing"):
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
    assert "no other size was checked" in stream.getvalue()


class ConstantOutput(Toy):
    """Two outputs, of which one says nothing of its image."""

    output_names = ("logits", "prior")

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> (B, 3), (B, 3)."""
        logits = super().forward(image)
        return logits, logits * 0 + 1


def test_output_that_ignores_the_image_is_told_once(tmp_path):
    with pytest.raises(ExportError) as error:
        export_onnx(ConstantOutput(), tmp_path / "model.onnx")
    assert str(error.value) == (
        "The output of ConstantOutput (prior) hardly depends on the image: the outputs for two images differ by only "
        "0, so that a comparison proves nothing. The weights are untrained or wrong: give trained weights, or skip the "
        "check with --no-check (check=False)."
    )


def test_weights_that_are_not_finite_are_refused_at_once(tmp_path):
    model = Toy()
    model.conv.bias.data[1] = float("nan")
    with pytest.raises(ExportError, match=r"weights contain values that are not finite: conv\.bias\. Train"):
        export_onnx(model, tmp_path / "model.onnx", check=False)


def test_what_no_model_can_have_is_no_metadata():
    spec = ExportSpec.of(Toy(), None, None, 20, "random", None)
    good = spec.to_metadata()
    assert ExportSpec.from_metadata(good) == spec
    for key, text, message in (
        ("task", None, "the entry task is missing"),
        ("input_size", "[3, 32", "the entry input_size is not JSON"),
        ("input_size", "[" * 100_000, "the entry input_size is not JSON"),
        ("input_size", "[3, 32]", "whole numbers of at least 1"),
        ("input_size", "[3, 32, -32]", "whole numbers of at least 1"),
        ("input_size", '[3, "32", 32]', r"input_size\[1\] must be int, not str"),
        ("input_names", '"image"', "input_names is not a list"),
        ("output_names", "[]", "there must be at least one input and one output"),
        ("size_multiple", "0", "whole numbers of at least 1"),
        ("size_multiple", "true", "size_multiple must be int, not bool"),
        ("batch", "null", "batch must be int, not NoneType"),
        ("scale", "1.5", "scale must be int, not float"),
        ("radius", "-1", "the radius must be at least 0"),
        ("mean", "[0.5]", "mean must be 3 finite numbers"),
        ("std", "[1, 1, 0]", "std must be above 0"),
        ("std", "[1, 1, NaN]", "std must be 3 finite numbers"),
        ("input_range", "[0, Infinity]", "input_range must be 2 finite numbers"),
        ("opset", "9" * 5000, "the entry opset is not JSON"),
    ):
        content = {**good, key: text} if text is not None else {k: v for k, v in good.items() if k != key}
        with pytest.raises(InputError, match=message):
            ExportSpec.from_metadata(content)
