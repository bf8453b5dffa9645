"""Conditional cross-attention: the contract, the equations in loops, many conditions as single ones, context."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import (
    AttributeSpecificAttention,
    ConditionalCrossAttention,
    ConditionalSimilarityMask,
    ConditionLinear,
)
from visionattn.errors import InputError


class TestConditionalCrossAttention(BlockContract):
    block = ConditionalCrossAttention
    cases = [
        {"dim": 8, "num_conditions": 3, "embed_dim": 5, "num_heads": 2},
        {"dim": 8, "num_conditions": 2, "embed_dim": 5, "width": 6, "num_heads": 3, "num_tokens": 2, "depth": 2},
        {"dim": 8, "num_conditions": 2, "embed_dim": 5, "num_heads": 1, "num_tokens": 2, "vector_dim": 7},
    ]

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, 8)

    def output_shape(self, case, x):
        return len(x), case["num_conditions"], case["embed_dim"]


def double(dim=12, num_conditions=4, **kwargs):
    return randomise(ConditionalCrossAttention(dim, num_conditions, dtype=torch.float64, **kwargs)).eval()


def norm(x, module):
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def read(q, tokens, reading):
    """Attention of one image and one query with keys and values in full, head by head."""
    h, d = reading.heads
    x = norm(tokens, reading.norm)  # (N, D)
    keys, values = x @ reading.key.weight.T, x @ reading.value.weight.T + reading.value.bias
    parts = []
    for head in range(h):
        part = slice(head * d, (head + 1) * d)
        shares = torch.stack([q[part] @ key / d**0.5 for key in keys[:, part]]).exp()
        parts.append(sum(share * value for share, value in zip(shares / shares.sum(), values[:, part])))
    return torch.cat(parts)


def by_the_equations(block, tokens, conditions, context=None, scale=1.0):
    """Image by image, condition by condition, token by token."""
    out = []
    for b, image in enumerate(tokens):
        for c in conditions:
            e = block.embed(block.table.rows[c]).reshape(block.num_tokens, -1)
            ends = []
            for z in e:
                for layer in block.blocks:
                    q = layer.query(norm(z, layer.norm1))
                    y = read(q, image, layer.image)
                    if context is not None:
                        y = y + scale * read(q, context[b], layer.context)
                    z = z + layer.proj(y)
                    z = z + layer.mlp(norm(z, layer.norm2))
                ends.append(norm(z, block.norm))
            f = block.proj(torch.cat(ends))
            out.append(f / f.square().sum().sqrt())
    return torch.stack(out).unflatten(0, (len(tokens), -1))


@pytest.mark.parametrize(
    "form",
    [
        {"num_heads": 3},
        {"num_heads": 2, "width": 8, "num_tokens": 3, "depth": 2},
        {"num_heads": 4, "vector_dim": 5, "num_tokens": 2},
    ],
)
def test_equals_the_equations(form):
    block, tokens = double(embed_dim=6, **form), torch.randn(2, 9, 12, dtype=torch.float64)
    ids = torch.tensor([2, 0, 3])
    torch.testing.assert_close(block(tokens, ids), by_the_equations(block, tokens, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_many_conditions_are_single_ones(dtype, tolerance):
    block = randomise(ConditionalCrossAttention(192, 6, num_heads=3, num_tokens=2, depth=2, dtype=dtype))
    tokens = torch.randn(4, 197, 192, dtype=dtype)
    with torch.no_grad():
        every = block(tokens)
        for c in range(6):
            torch.testing.assert_close(block(tokens, torch.tensor([c])), every[:, [c]], rtol=0, atol=tolerance)
        order = torch.tensor([4, 1, 1])
        torch.testing.assert_close(block(tokens, order), every[:, order], rtol=0, atol=tolerance)
    assert (every[:, 0] - every[:, 1]).abs().max() > 0.01
    torch.testing.assert_close(every.norm(dim=-1), torch.ones(4, 6, dtype=dtype))


def test_a_vector_from_outside_is_a_condition():
    tokens = torch.randn(2, 5, 12, dtype=torch.float64)
    for form in ({}, {"vector_dim": 7}):
        block = double(**form)
        torch.testing.assert_close(block.forward_vectors(tokens, block.table(None)), block(tokens))
        mixed = block.forward_vectors(tokens, block.table(None).mean(0, keepdim=True))
        assert mixed.shape == (2, 1, 128)
        assert (mixed - block(tokens)).abs().amax((0, 2)).min() > 0.01


def test_second_source():
    tokens, context = torch.randn(2, 6, 12).double(), torch.randn(2, 4, 5).double()
    block = double(embed_dim=6, num_tokens=2, depth=2, context_dim=5)
    ids = torch.tensor([3, 1])
    for scale in (1.0, 0.3):
        expected = by_the_equations(block, tokens, ids, context, scale)
        torch.testing.assert_close(block(tokens, ids, context, scale), expected, rtol=0, atol=1e-12)
    base = double(embed_dim=6, num_tokens=2, depth=2)
    base.load_state_dict({key: value for key, value in block.state_dict().items() if ".context." not in key})
    for restored in (block(tokens, ids, context, 0.0), block(tokens, ids)):
        assert torch.equal(restored, base(tokens, ids))
    assert (block(tokens, ids, context) - base(tokens, ids)).abs().max() > 0.01
    block(tokens, None, context)[..., 0].sum().backward()
    assert all(p.grad.any() for p in block.parameters())


def test_one_more_condition_leaves_the_others_alone():
    """Bit by bit, before and after the new row is trained."""
    block, tokens = randomise(ConditionalCrossAttention(16, 2)), torch.randn(3, 5, 16)
    old = torch.tensor([0, 1])
    before = block(tokens, old)
    (row,) = block.add_conditions()
    assert torch.equal(block(tokens, old), before)
    start = row.detach().clone()
    optimizer = torch.optim.AdamW([row], lr=0.1, weight_decay=0.5)
    block(tokens)[:, 2, 0].sum().backward()
    optimizer.step()
    assert not torch.equal(row, start)
    assert torch.equal(block(tokens, old), before)
    assert block(tokens).shape == (3, 3, 128)


def test_maps_are_a_condition_over_the_mean_one():
    block = double(num_heads=2, num_tokens=2)
    tokens = torch.randn(2, 7, 12, dtype=torch.float64)
    layer = block.blocks[0]
    h, d = layer.image.heads

    def attention(rows, image):
        """Mean over tokens and heads of one condition's shares."""
        x, maps = norm(image, layer.image.norm), []
        for e in rows.reshape(block.num_tokens, -1):
            q = layer.query(norm(e, layer.norm1))
            keys = x @ layer.image.key.weight.T
            maps += [(keys[:, s] @ q[s] / d**0.5).softmax(0) for s in torch.arange(h * d).reshape(h, d)]
        return sum(maps) / len(maps)

    mean = sum(block.table.rows) / 4
    found = block.explain(tokens, torch.tensor([3, 0]))
    for b, image in enumerate(tokens):
        for place, c in enumerate((3, 0)):
            expected = attention(block.table.rows[c], image) / attention(mean, image)
            torch.testing.assert_close(found[b, place], expected)
    assert double(depth=2).explain(tokens).shape == (2, 4, 7)


def test_operations():
    """Nothing but the scores and averages grows with the image: 4 h N D a condition, beside its own projections."""

    def count(conditions, tokens):
        block = ConditionalCrossAttention(192, 6, num_heads=3, device="meta")
        ids = torch.zeros(conditions, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter:
            block(torch.empty(1, tokens, 192, device="meta"), ids)
        return counter.get_total_flops()

    assert count(1, 197) - count(1, 196) == 4 * 3 * 192
    # Query, two products with a head's part of key and value, output, MLP of ratio 4, embedding.
    assert count(1, 196) == 4 * 3 * 196 * 192 + 2 * (4 + 8) * 192**2 + 2 * 192 * 128
    assert count(6, 196) == 6 * count(1, 196)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_conditions": 0}, "num_conditions must be at least 1; got 0"),
        ({"num_heads": 3}, "width divisible by num_heads; got dim 8, .* width 8, num_heads 3"),
        ({"num_tokens": 0}, "num_tokens 0"),
        ({"depth": 0}, "depth 0"),
    ],
)
def test_wrong_sizes(arguments, message):
    with pytest.raises(InputError, match=message):
        ConditionalCrossAttention(**{"dim": 8, "num_conditions": 2, **arguments})


@pytest.mark.parametrize(
    ("conditions", "given"),
    [
        (1, "got 1"),
        ([0, 1], r"got \[0, 1\]"),
        (torch.tensor(1), r"got \(\) of torch.int64"),
        (torch.tensor([[0, 1]]), r"got \(1, 2\) of torch.int64"),
        (torch.tensor([True, False]), r"got \(2,\) of torch.bool"),
        (torch.tensor([0.0]), r"got \(1,\) of torch.float32"),
    ],
)
@pytest.mark.parametrize(
    "head", [ConditionalCrossAttention, ConditionLinear, ConditionalSimilarityMask, AttributeSpecificAttention]
)
def test_conditions_of_other_kinds_are_refused(head, conditions, given):
    with pytest.raises(InputError, match=rf"conditions must be an int64 tensor \(C',\).*{given}"):
        head(8, 2)(torch.randn(1, 4, 8), conditions)
