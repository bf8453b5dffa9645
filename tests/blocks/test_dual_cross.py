"""Dual cross-attention: the contract, PWCA and GLCA in loops, roll-out as a product of matrices, weights of losses."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import DualCrossAttention, DualCrossBlock, GlobalLocalCrossAttention
from visionattn.blocks.dual_cross import UncertaintyWeighting, roll_out, select_local
from visionattn.errors import InputError


class Tokens:
    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, 8)


class TestDualCrossAttention(Tokens, BlockContract):
    block = DualCrossAttention
    cases = [{"dim": 8, "num_heads": 2}]


class TestDualCrossBlock(Tokens, BlockContract):
    block = DualCrossBlock
    cases = [{"dim": 8, "num_heads": 2}, {"dim": 8, "num_heads": 4, "mlp_ratio": 2.0, "qkv_bias": False}]


class FirstAsks(nn.Module):
    """GLCA as a block of one input: its first token and all of them."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x[:, :1], x)


class TestGlobalLocalCrossAttention(Tokens, BlockContract):
    block = GlobalLocalCrossAttention
    cases = [{"dim": 8, "num_heads": 2}]

    def make(self, case, **kwargs):
        return FirstAsks(super().make(case, **kwargs)).eval()

    def output_shape(self, case, x):
        return len(x), 1, 8


def softmax_of(q, keys, values, heads):
    """One query: keys and values (N, C), head by head."""
    parts, d = [], len(q) // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        shares = torch.stack([q[part] @ key / d**0.5 for key in keys[:, part]]).exp()
        parts.append(sum(share * value for share, value in zip(shares / shares.sum(), values[:, part])))
    return torch.cat(parts)


def double(block, *args, **kwargs):
    return randomise(block(*args, dtype=torch.float64, **kwargs)).eval()


def test_pairwise_is_one_softmax_over_both_images():
    attention = double(DualCrossAttention, 12, 3)
    x, other = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    found = attention.pairwise(x, other)
    for b in range(2):
        q = attention.qkv(x[b])[:, :12]
        keys, values = attention.qkv(torch.cat([x[b], other[b]]))[:, 12:].split(12, -1)
        expected = torch.stack([attention.proj(softmax_of(row, keys, values, 3)) for row in q])
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)
    # A partner without tokens leaves self-attention.
    torch.testing.assert_close(attention.pairwise(x, other[:, :0]), attention(x))
    # Paired with itself, an image has each key twice, at half the share.
    torch.testing.assert_close(attention.pairwise(x, x), attention(x))


def test_block_is_timms():
    ours, theirs = DualCrossBlock(24, 3), Block(24, 3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 24)
    assert torch.equal(ours(x), theirs(x))


def test_map_is_the_mean_of_timms_heads():
    block, x = double(DualCrossBlock, 12, 3), torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    kept = []
    theirs = double(Block, 12, 3, qkv_bias=True)
    theirs.attn.fused_attn = False
    theirs.load_state_dict(block.state_dict())
    theirs.attn.attn_drop.register_forward_hook(lambda module, inputs, output: kept.append(output))
    theirs(x)
    found = block.attention_map(x)
    torch.testing.assert_close(found, kept[0].mean(1))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 6).double())
    assert not found.requires_grad


def test_roll_out_is_row_0_of_the_product():
    maps = [torch.rand(2, 6, 6, dtype=torch.float64).softmax(-1) for _ in range(4)]
    product = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    for attention in maps:
        product = (0.5 * attention + 0.5 * torch.eye(6)) @ product
    torch.testing.assert_close(roll_out(maps), product[:, 0])
    torch.testing.assert_close(roll_out(maps).sum(-1), torch.ones(2).double())


def test_the_most_relevant_patches_are_selected():
    tokens, relevance = torch.randn(2, 7, 3), torch.rand(2, 7)
    relevance[:, 0] = 0
    found = select_local(tokens, relevance, 3)
    for b in range(2):
        order = sorted(range(1, 7), key=lambda n: -relevance[b, n].item())
        assert torch.equal(found[b], tokens[b, [0, *order[:3]]])
    assert torch.equal(select_local(tokens, relevance, 0), tokens[:, :1])


def test_global_local_attention():
    glca = double(GlobalLocalCrossAttention, 12, 3)
    tokens = torch.randn(2, 7, 12).double()
    local = tokens[:, [0, 4, 2]]
    found = glca(local, tokens)
    for b in range(2):
        keys, values = glca.kv(glca.norm1(tokens[b])).split(12, -1)
        for place, token in enumerate(local[b]):
            y = token + glca.proj(softmax_of(glca.q(glca.norm1(token)), keys, values, 3))
            torch.testing.assert_close(found[b, place], y + glca.mlp(glca.norm2(y)), rtol=0, atol=1e-12)
    # The class token does not see which others ask.
    torch.testing.assert_close(glca(tokens[:, :1], tokens), found[:, :1], rtol=0, atol=1e-12)


def test_uncertainty_weighting():
    weighting = UncertaintyWeighting(3, dtype=torch.float64)
    losses = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    assert weighting(losses).item() == pytest.approx(losses.sum().item() / 2)
    # Of constant losses the minimum is at w = log L, where each term is (1 + log L) / 2.
    weighting.weight.data.copy_(losses.log())
    weighting(losses).backward()
    assert weighting.weight.grad.abs().max() < 1e-15
    assert weighting(losses).item() == pytest.approx((0.5 * (1 + losses.log())).sum().item())


def test_training_through_pairs_moves_the_weights_of_self_attention():
    block = DualCrossBlock(8, 2)
    before = copy.deepcopy(block.state_dict())
    block.pairwise(*torch.randn(2, 3, 5, 8)).square().sum().backward()
    assert set(before) == {name for name, p in block.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", [DualCrossAttention, DualCrossBlock, GlobalLocalCrossAttention])
def test_heads_divide_the_width(block):
    with pytest.raises(InputError, match=r"dim \(8\) must be divisible by num_heads \(3\)"):
        block(8, 3)
