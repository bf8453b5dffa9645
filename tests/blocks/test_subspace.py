"""Subspace attention: the contract, branches written out, the authors' state dict, folding, the paper's numbers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import SubspaceAttention
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


class TestSubspaceAttention(BlockContract):
    block = SubspaceAttention
    cases = [
        {"dim": 24},
        {"dim": 24, "num_subspaces": 3, "form": "module"},
        {"dim": 24, "num_subspaces": 2, "gain": "scaled"},
        {"dim": 24, "num_subspaces": 4, "form": "module", "gain": "learned"},
    ]
    open_axes = (0, 2, 3)

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, 24, size, size + 2)


class Branch(nn.Module):
    """One subspace as its own stack of layers, under the names of the authors' state dict."""

    def __init__(self, width):
        super().__init__()
        self.conv_dws = nn.Conv2d(width, width, 1, groups=width)
        self.bn_dws = nn.BatchNorm2d(width, momentum=0.9)
        self.conv_point = nn.Conv2d(width, 1, 1)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9)

    def forward(self, x):
        t = F.max_pool2d(self.bn_dws(self.conv_dws(x)).relu(), 3, stride=1, padding=1)
        s = self.bn_point(self.conv_point(t)).relu()
        return x * (1 + s.flatten(1).softmax(1).view_as(s))


class Branches(nn.Module):
    def __init__(self, dim, num_subspaces):
        super().__init__()
        self.subspaces = nn.ModuleList(Branch(dim // num_subspaces) for _ in range(num_subspaces))

    def forward(self, x):
        parts = x.chunk(len(self.subspaces), 1)
        return torch.cat([branch(part) for branch, part in zip(self.subspaces, parts)], 1)


def twins(dim, num_subspaces, dtype=torch.float64):
    """Branches and a block with their weights."""
    branches = Branches(dim, num_subspaces).to(dtype)
    for parameter in branches.parameters():
        nn.init.normal_(parameter)
    block = SubspaceAttention(dim, num_subspaces, "module", dtype=dtype)
    block.load_state_dict(branches.state_dict())
    return branches, block


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_subspaces", [1, 4, 8, 16])
@pytest.mark.parametrize("size", [(14, 14), (5, 11), (1, 6)])
def test_equals_branches_in_training_and_evaluation(num_subspaces, size, dtype):
    branches, block = twins(32, num_subspaces, dtype)
    for _ in range(2):  # running statistics of the second batch contain those of the first
        x = torch.randn(3, 32, *size, dtype=dtype)
        torch.testing.assert_close(block(x), branches(x), rtol=0, atol=TOLERANCE[dtype] * x.abs().max().item())
    trained = SubspaceAttention(32, num_subspaces, "module", dtype=dtype)
    trained.load_state_dict(branches.state_dict())
    for (key, found), expected in zip(block.state_dict().items(), trained.state_dict().values()):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=key)
    block, branches = trained.eval(), branches.eval()
    torch.testing.assert_close(block(x), branches(x), rtol=0, atol=TOLERANCE[dtype] * x.abs().max().item())


def test_gradients_equal_those_of_the_branches():
    branches, block = twins(12, 3)
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64)
    weight, found = torch.randn_like(x), {}
    for module in (branches, block):
        module.zero_grad()
        (module(x) * weight).sum().backward()
    for ours, theirs in {"scale": "conv_dws.weight", "point": "conv_point.weight", "norm.bias": "bn_dws.bias"}.items():
        expected = torch.cat([branch.get_parameter(theirs).grad.flatten() for branch in branches.subspaces])
        found[ours] = block.get_parameter(ours).grad.flatten()
        torch.testing.assert_close(found[ours], expected, rtol=0, atol=1e-12)
        assert expected.any()
    for name in ("shift", "offset"):  # cancelled by batch norm
        assert block.get_parameter(name).grad.abs().max() < 1e-14


@pytest.mark.parametrize("gain", ["paper", "scaled", "learned"])
def test_paper_form_is_its_equations(gain):
    block = randomise(SubspaceAttention(12, 3, gain=gain, dtype=torch.float64))
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    expected = []
    for n, part in enumerate(x.chunk(3, 1)):
        t = F.max_pool2d(part * block.scale[4 * n : 4 * n + 4, None, None], 3, 1, 1)
        A = (t * block.point[n, :, None, None]).sum(1, keepdim=True).flatten(1).softmax(1).view(2, 1, 5, 7)
        factor = {"paper": 1, "scaled": 35, "learned": 35 * block.gain[n] if gain == "learned" else 0}[gain]
        expected.append(part * (1 + factor * A))
    torch.testing.assert_close(block(x), torch.cat(expected, 1), rtol=0, atol=1e-14)


def test_mean_gains():
    x = torch.ones(1, 8, 14, 14)
    assert SubspaceAttention(8)(x).mean().item() == pytest.approx(1 + 1 / 196)
    assert SubspaceAttention(8, gain="scaled")(x).mean().item() == pytest.approx(2)
    assert torch.equal(SubspaceAttention(8, gain="learned")(x), x)


@pytest.mark.parametrize(("num_subspaces"), [1, 4, 16])
def test_costs_of_the_paper(num_subspaces):
    """512 channels at 14 x 14: its table says 1 thousand parameters and 0.2 million multiply-accumulates."""
    block = SubspaceAttention(512, num_subspaces)
    assert count_parameters(block) == 2 * 512
    assert count_macs(block, (512, 14, 14)) == 2 * 512 * 196
    assert count_parameters(SubspaceAttention(512, num_subspaces, "module")) == 5 * 512 + 3 * num_subspaces


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_folded_equals_unfolded(dtype):
    _, block = twins(24, 4, dtype)
    for _ in range(3):
        block(torch.randn(4, 24, 6, 5, dtype=dtype))
    block.eval()
    x = torch.randn(2, 24, 9, 7, dtype=dtype)
    expected = block(x)
    block.fuse()
    assert [name for name, _ in block.named_buffers()] == []
    assert sorted(name for name, _ in block.named_parameters()) == ["offset", "point", "scale", "shift"]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(block.train()(x), block.eval()(x))
    kept = block.scale.clone()
    block.fuse()
    assert torch.equal(block.scale, kept)


def test_a_cumulative_average_of_statistics():
    """`momentum = None`, which `torch.optim.swa_utils.update_bn` sets, means the mean over all batches."""
    branches, block = twins(8, 2)
    for norm in (*(module for module in branches.modules() if isinstance(module, nn.BatchNorm2d)), block.norm):
        norm.momentum = None
    for _ in range(3):
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
        block(x)
        branches(x)
    expected = torch.cat([branch.bn_dws.running_var for branch in branches.subspaces])
    torch.testing.assert_close(block.norm.running_var, expected, rtol=0, atol=1e-12)


def test_published_state_dict_loads_inside_a_network():
    branches = Branches(8, 2).double()
    network = nn.Sequential(nn.Identity(), SubspaceAttention(8, 2, "module", dtype=torch.float64))
    network.load_state_dict(nn.Sequential(nn.Identity(), branches).state_dict())
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(network.eval()(x), branches.eval()(x))
    other = SubspaceAttention(8, 2, "module", dtype=torch.float64)
    other.load_state_dict(network[1].state_dict())
    assert torch.equal(other.point, network[1].point)
    with pytest.raises(RuntimeError, match="size mismatch for point"):
        SubspaceAttention(8, 4, "module").load_state_dict(branches.state_dict())


def test_one_value_a_channel_has_no_statistics():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        SubspaceAttention(4, 2, "module")(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dim": 10}, r"dim \(10\) must be divisible by num_subspaces \(4\)"),
        ({"dim": 8, "num_subspaces": 0}, r"dim \(8\) must be divisible by num_subspaces \(0\)"),
        ({"dim": 8, "form": "code"}, "form must be one of 'paper', 'module'; got 'code'"),
        ({"dim": 8, "gain": "double"}, "gain must be one of 'paper', 'scaled', 'learned'; got 'double'"),
    ],
)
def test_wrong_arguments_are_named(settings, text):
    with pytest.raises(InputError, match=text):
        SubspaceAttention(**settings)


@pytest.mark.parametrize("form", ["paper", "module"])
def test_training_mode_traces_and_scripts(form):
    block = SubspaceAttention(8, 2, form).train()
    x = torch.randn(2, 8, 4, 5)
    scripted, expected = torch.jit.script(block), block(x)
    torch.testing.assert_close(scripted(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), expected)


@pytest.mark.parametrize(("form", "gain"), [("paper", "scaled"), ("module", "learned")])
def test_onnx_at_three_sizes(form, gain, tmp_path):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from tests.export.toys import Toy
    from visionattn.export import export_onnx

    class Attending(Toy):
        def __init__(self):
            super().__init__()
            self.wide = nn.Conv2d(3, 12, 3, padding=1, stride=2)
            self.block = randomise(SubspaceAttention(12, 3, form, gain))

        def forward(self, image):
            return self.block(self.wide(image)).mean((2, 3))

    file = export_onnx(Attending().eval(), tmp_path / "model.onnx")
    assert file.spec.dynamic_axes == ["batch", "height", "width"]
    assert len({(row.height, row.width) for row in file.rows}) == 3
    assert max(row.error / row.spread for row in file.rows) < 2e-5
