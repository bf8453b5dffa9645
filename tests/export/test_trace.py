"""Forms that are exported in the place of others: the same values, in fewer operators and with shorter sizes."""

import time

import onnx
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding
from torch import nn
from torch.export import Dim

from tests.export.toys import Toy
from visionattn.errors import ExportError
from visionattn.export import export_onnx
from visionattn.export.budget import Budget, TimeLimitError
from visionattn.export.trace import trace

OPEN = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


class Attending(Toy):
    """Attention of pixels, without a mask, with one, and with a scale of its own."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        x = self.conv(image[..., ::4, ::4]).flatten(2).transpose(1, 2)[:, None]  # (B, 1, N, 3)
        y = F.scaled_dot_product_attention(x, 3 * x, x)
        y = y + F.scaled_dot_product_attention(x, x, y, attn_mask=x.mean(-1, keepdim=True))
        return (y + F.scaled_dot_product_attention(y, x, x, scale=2.0)).mean((1, 2))


def test_keys_are_transposed_in_one_operator(tmp_path):
    file = export_onnx(Attending(), tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(file.path).graph.node]
    assert kinds.count("Softmax") == 3
    assert kinds.count("Transpose") == 1 + 2  # the pixels; two attentions have the same K
    assert "Concat" not in kinds[kinds.index("Softmax") :]
    assert max(row.error / row.spread for row in file.rows) < 1e-5


def test_relu6_is_a_clamp():
    model = nn.Sequential(nn.ReLU6(inplace=True), nn.Hardtanh(0.1, 0.7)).eval()
    program = trace(model, [torch.zeros(2, 3)], [{0: Dim.DYNAMIC}], Budget())
    kinds = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert kinds.count("aten.clamp.default") == 2
    assert not any("hardtanh" in kind for kind in kinds)
    x = torch.linspace(-1, 8, 10)[:, None].repeat(1, 3)
    torch.testing.assert_close(program.module()(x), x.clamp(0.1, 0.7))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_pixel_unshuffle_is_a_transpose(batch):
    x = torch.rand(*batch, 5, 12, 9)
    program = trace(nn.PixelUnshuffle(3), [x], [{}], Budget())
    assert not any("pixel_unshuffle" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), F.pixel_unshuffle(x, 3))


@pytest.mark.parametrize("more", [{"is_causal": True}, {"attn_mask": torch.ones(1, 4, 4, dtype=torch.bool)}], ids=str)
def test_other_attention_is_left_to_the_exporter(more):
    class Causal(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, **more)

    program = trace(Causal(), [torch.rand(2, 1, 4, 8)], [{0: Dim.DYNAMIC}], Budget())
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)


class Same(Toy):
    """Six strided convolutions with SAME padding, of each kind that networks have."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [(3, 2, 1), (5, 2, 1), (1, 2, 1), (3, 2, 2), (7, 3, 1), (3, 2, 1)]  # kernel size, stride, dilation
        self.convolutions = nn.Sequential(
            *[Conv2dSame(3, 3, size, stride, dilation=dilation, bias=False) for size, stride, dilation in kinds]
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        return super().forward(self.convolutions(image))


def test_sizes_after_same_padding_stay_short():
    """By timm's formula each convolution takes three to four times as long as the one before, the sixth minutes."""
    start = time.process_time()
    model = Same().eval()
    program = trace(model, [torch.rand(2, 3, 161, 203)], [OPEN], Budget())
    assert time.process_time() - start < 30
    for height, width in ((161, 203), (97, 128), (200, 160)):
        images = torch.rand(1, 3, height, width)
        torch.testing.assert_close(program.module()(images), model(images))
    assert max(len(str(node.meta["val"].shape)) for node in program.graph.nodes if "conv" in str(node.target)) < 400


def test_timm_has_its_own_padding_again():
    assert [get_same_padding(size, 3, 2, 1) for size in (7, 8)] == [2, 1]
    assert get_same_padding.__module__ == "timm.layers.padding"


def test_time_limit_names_the_way_out(tmp_path):
    with pytest.raises(ExportError) as error:
        export_onnx(Toy(), tmp_path / "model.onnx", time_limit=1e-9)
    assert str(error.value) == (
        "torch.export cannot export Toy with dynamic batch, height, width. Reason: tracing did not end within the "
        "limit of 1e-09 s of CPU time for all steps; raise it with --time-limit (time_limit=). To export one fixed "
        "size (32 x 32) instead, use --static-size (dynamic_size=False)."
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(TimeLimitError):
        trace(Toy(), [torch.rand(2, 3, 8, 8)], [OPEN], Budget(1e-9))
