"""Efficient probing: the contract, the authors' order of the same sums, parameters, and folding a multi-head pool."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import EfficientProbing
from visionattn.blocks.efficient_probing import fold_multi_head
from visionattn.errors import InputError


class TestEfficientProbing(BlockContract):
    block = EfficientProbing
    cases = [
        {"dim": 8, "num_queries": 4},
        {"dim": 8, "num_queries": 3, "out_dim": 12, "value_bias": True},
        {"dim": 8, "num_queries": 1, "out_dim": 2},
    ]

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, 8)

    def output_shape(self, case, x):
        return len(x), case.get("out_dim", 8)


def values_first(block, tokens, mask):
    """The authors' order: every token is projected, then each query averages its part of the values."""
    M, D = block.queries.shape
    parts = block.value(tokens).unflatten(-1, (M, -1))  # (B, N, M, D_o / M)
    out, shares = [], []
    for m in range(M):
        logits = torch.einsum("d,bnd->bn", block.queries[m] / D**0.5, tokens)
        share = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        out.append(torch.einsum("bn,bno->bo", share, parts[:, :, m]))
        shares.append(share)
    return torch.cat(out, -1), torch.stack(shares, 1)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("out_dim", "bias"), [(None, False), (None, True), (24, True), (96, False)])
def test_equals_the_order_of_the_authors(out_dim, bias, with_mask):
    block = EfficientProbing(48, 8, out_dim, bias, dtype=torch.float64)
    with torch.no_grad():
        block.queries.mul_(100)
    tokens = torch.randn(3, 17, 48, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 17) < 0.6 if with_mask else torch.ones(3, 17, dtype=torch.bool)
    leaves = [tokens, *block.parameters()]
    found = block(tokens, mask if with_mask else None, return_attention=True)
    expected = values_first(block, tokens, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad((y.sin() + 1).prod(), leaves) for y in (found[0], expected[0]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "queries", "out_dim", "parameters"),
    [
        (768, 8, None, 595_968),
        (768, 16, None, 602_112),
        (768, 32, None, 614_400),
        (768, 64, None, 638_976),
        (384, 8, None, 150_528),
        (384, 32, None, 159_744),
        (1024, 32, None, 1_081_344),
        (768, 32, 384, 319_488),
        (768, 32, 192, 172_032),
        (768, 8, 96, 79_872),
    ],
)
def test_parameters_of_the_authors_modules(dim, queries, out_dim, parameters):
    block = EfficientProbing(dim, queries, out_dim, device="meta")
    assert sum(p.numel() for p in block.parameters()) == parameters


def test_operations_of_both_orders():
    block, tokens = EfficientProbing(768, device="meta"), torch.empty(1, 196, 768, device="meta")

    def count(function, *args):
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    assert count(block, tokens) == 4 * 32 * 196 * 768 + 2 * 768 * 768 == 20_447_232
    mask = torch.ones(1, 196, dtype=torch.bool, device="meta")
    expected = 2 * 196 * 768 * 768 + 2 * 32 * 196 * 768 + 2 * 196 * 768
    assert count(values_first, block, tokens, mask) == expected == 241_145_856


def test_starts_as_the_authors_do():
    block = EfficientProbing(768)
    assert abs(block.queries.std().item() / 0.02 - 1) < 0.02
    assert abs(block.queries.mean().item()) < 5e-4
    assert block.value.bias is None


def test_attention_is_shares():
    block = randomise(EfficientProbing(8, 4))
    tokens, mask = torch.randn(3, 9, 8), torch.rand(3, 9) < 0.5
    _, attention = block(tokens, mask, return_attention=True)
    assert attention.shape == (3, 4, 9)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4))
    assert not attention.masked_select(~mask[:, None]).any()
    torch.testing.assert_close(block(tokens, return_attention=True)[1].sum(-1), torch.ones(3, 4))


def test_equal_tokens_are_averaged_to_themselves():
    block = randomise(EfficientProbing(8, 4, value_bias=True))
    token = torch.randn(2, 1, 8)
    torch.testing.assert_close(block(token.expand(-1, 13, -1)), block.value(token[:, 0]))


def test_masked_tokens_do_not_count():
    block = randomise(EfficientProbing(8, 4, value_bias=True))
    tokens, mask = torch.randn(2, 9, 8), torch.arange(9).expand(2, -1) < 5
    torch.testing.assert_close(block(tokens, mask), block(tokens[:, :5]))
    nothing = block(tokens, torch.zeros_like(mask))
    torch.testing.assert_close(nothing, block.value.bias.expand(2, -1))


def test_the_order_of_tokens_does_not_count():
    block, tokens = randomise(EfficientProbing(8, 4)), torch.randn(2, 9, 8)
    torch.testing.assert_close(block(tokens.flip(1)), block(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_frozen_tokens_of_half_precision(dtype):
    block = randomise(EfficientProbing(16, 4))
    tokens = torch.randn(2, 9, 16).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = block(tokens)
    assert out.dtype == dtype
    expected = block(tokens.float())
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-2 * expected.abs().max().item())
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}


class Shares(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens):
        return self.block(tokens, None, True)[1]


def test_attention_inside_a_traced_module():
    block, tokens = randomise(EfficientProbing(8, 4)), torch.randn(2, 9, 8)
    expected = block(tokens, return_attention=True)[1]
    torch.testing.assert_close(fx.symbolic_trace(Shares(block))(tokens), expected)
    program = torch.export.export(Shares(block), (tokens,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(tokens[:1]), expected[:1])


def multi_head(query, key_weight, value_weight, heads, tokens, mean=None, inv_std=None):
    """Cross-attention with one learned query after a batch norm in evaluation."""
    if mean is not None:
        tokens = tokens - mean
    if inv_std is not None:
        tokens = tokens * inv_std

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = split(query.reshape(1, 1, -1).expand(len(tokens), -1, -1))
    return F.scaled_dot_product_attention(q, split(tokens @ key_weight.T), split(tokens @ value_weight.T)).flatten(1)


@pytest.mark.parametrize("norm", ["none", "batch norm", "deviation alone", "mean alone"])
@pytest.mark.parametrize(("dim", "keys", "out_dim", "heads"), [(48, 48, 48, 12), (24, 36, 60, 3), (16, 16, 16, 1)])
def test_folded_head_is_the_same_function(dim, keys, out_dim, heads, norm):
    query, key_weight, value_weight = (
        torch.randn(shape, dtype=torch.float64) for shape in [(1, 1, keys), (keys, dim), (out_dim, dim)]
    )
    tokens = 3 * torch.randn(4, 19, dim, dtype=torch.float64) + 2
    statistics = {}
    if norm in ("batch norm", "mean alone"):
        statistics["mean"] = tokens.mean((0, 1))
    if norm in ("batch norm", "deviation alone"):
        statistics["inv_std"] = (tokens.var((0, 1)) + 1e-6).rsqrt()
    weights = query, key_weight / dim**0.5, value_weight / dim**0.5
    block = fold_multi_head(*weights, heads, **statistics)
    assert (block.value.bias is None) == ("mean" not in statistics)
    assert all(p.requires_grad and p.dtype == torch.float64 for p in block.parameters())
    expected = multi_head(*weights, heads, tokens, **statistics)
    torch.testing.assert_close(block(tokens), expected, rtol=0, atol=1e-12)


def test_folding_is_done_in_float64():
    weights = torch.randn(32), torch.randn(32, 32), torch.randn(32, 32)
    statistics = torch.randn(32), torch.rand(32) + 0.5
    block = fold_multi_head(*weights, 4, *statistics)
    exact = fold_multi_head(*(x.double() for x in weights), 4, *(x.double() for x in statistics))
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).float())


@pytest.mark.parametrize("sizes", [(8, 3, 8), (8, 32, None), (8, 0, 8), (0, 1, 8), (8, 4, 0)])
def test_wrong_sizes_are_named(sizes):
    with pytest.raises(InputError, match=f"num_queries {sizes[1]}"):
        EfficientProbing(*sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.ones(7)},
        {"key_weight": torch.ones(8)},
        {"value_weight": torch.ones(8, 7)},
        {"num_heads": 3},
        {"num_heads": 0},
        {"mean": torch.ones(7)},
        {"inv_std": torch.ones(1)},
    ],
    ids=lambda change: "-".join(change),
)
def test_heads_that_do_not_fit_are_refused(change):
    given = {"query": torch.ones(8), "key_weight": torch.ones(8, 8), "value_weight": torch.ones(8, 8), "num_heads": 4}
    with pytest.raises(InputError, match="Folding"):
        fold_multi_head(**given | change)


def test_heads_that_do_not_divide_the_values_are_refused():
    with pytest.raises(InputError, match="out_dim 6 and num_queries 4"):
        fold_multi_head(torch.ones(8), torch.ones(8, 8), torch.ones(6, 8), 4)
