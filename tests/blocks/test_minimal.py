"""Minimal attention against loops in float64, against timm, and against its paper's claims."""

import itertools
import math

import pytest
import torch
from timm.layers import Attention

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import MinimalAttention, MinimalBlock
from visionattn.blocks.minimal import SIMILARITIES, VALUES
from visionattn.cost import count_macs
from visionattn.errors import InputError

FORMS = [
    {"similarity": similarity, "values": values, "num_heads": heads}
    for similarity, values, heads in itertools.product(SIMILARITIES, VALUES, (1, 2))
]


def form(case):
    return "-".join(map(str, case.values()))


class TestMinimalAttention(BlockContract):
    block = MinimalAttention
    cases = [{"dim": 8, **case} for case in FORMS]

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, 8)


class TestMinimalBlock(BlockContract):
    block = MinimalBlock
    cases = [
        {"dim": 8, "num_heads": 2},
        {"dim": 8, "num_heads": 2, "values": "shaped"},
        {"dim": 8, "num_heads": 1, "similarity": "symmetric", "values": "identity", "mlp_ratio": 0},
    ]

    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, 8)


def triangle(attention, head):
    """T of one head, filled row by row."""
    full, numbers = torch.zeros(attention.dim, attention.dim, dtype=torch.float64), iter(attention.triangle[head])
    for row in range(attention.dim):
        for column in range(row + 1):
            full[row, column] = next(numbers)
    return full


@torch.no_grad()
def definition(attention, x):
    """The docstring's equations, token by token and head by head."""
    C, H = attention.dim, attention.num_heads
    D = C // H
    weight = attention.qkv.weight if attention.qkv is not None else torch.empty(0, C, dtype=x.dtype)
    bias = attention.qkv.bias if attention.qkv is not None else torch.empty(0, dtype=x.dtype)
    rows = {"pair": D, "shared": D, "collapsed": C, "symmetric": 0}[attention.similarity]
    out = torch.empty_like(x)
    for b, h in itertools.product(range(len(x)), range(H)):
        tokens = x[b]
        N = len(tokens)
        own = slice(h * D, (h + 1) * D)
        first = slice(h * rows, (h + 1) * rows)
        second = slice(C + h * D, C + (h + 1) * D)
        if attention.similarity == "symmetric":
            q = tokens @ triangle(attention, h)
        else:
            q = tokens @ weight[first].T + bias[first]
        if attention.similarity == "pair":
            k = tokens @ weight[second].T + bias[second]
        else:
            k = tokens if attention.similarity == "collapsed" else q
        projected = attention.values == "projected"
        values = (tokens @ weight[-C:].T + bias[-C:])[:, own] if projected else tokens[:, own]
        for i in range(N):
            scores = [float(q[i] @ k[j]) / math.sqrt(q.shape[1]) for j in range(N)]
            total = sum(math.exp(s) for s in scores)
            shares = [math.exp(s) / total for s in scores]
            if attention.values == "shaped":
                alpha, beta, gamma = (float(gain) for gain in attention.gains[:, h].flatten())
                shares = [alpha * (i == j) + beta * share - gamma / N for j, share in enumerate(shares)]
            out[b, i, own] = sum(share * values[j] for j, share in enumerate(shares))
    return out @ attention.proj.weight.T + attention.proj.bias if attention.values == "projected" else out


@pytest.mark.parametrize("case", FORMS, ids=form)
def test_equals_the_equations(case):
    attention = randomise(MinimalAttention(6, **case, dtype=torch.float64))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(attention(x), definition(attention, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", FORMS, ids=form)
def test_attention_weights_are_those_of_forward(case):
    attention = randomise(MinimalAttention(6, **case, dtype=torch.float64))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    *_, values = attention.project(x)
    mixed = (attention.attention_weights(x) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(mixed), attention(x))


def test_baseline_equals_timm():
    ours = randomise(MinimalAttention(24, 3, dtype=torch.float64))
    timms = Attention(24, 3, qkv_bias=True, dtype=torch.float64)
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), timms(x))


def test_collapsed_and_pair_are_one_function():
    pair = randomise(MinimalAttention(8, 1, dtype=torch.float64))
    torch.nn.init.zeros_(pair.qkv.bias)
    collapsed = MinimalAttention(8, 1, "collapsed", dtype=torch.float64)
    query, key, value = pair.qkv.weight.split(8)
    with torch.no_grad():
        collapsed.qkv.weight.copy_(torch.cat([key.T @ query, value]))
        collapsed.qkv.bias.zero_()
    collapsed.proj.load_state_dict(pair.proj.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(collapsed(x), pair(x))


@pytest.mark.parametrize("similarity", ["shared", "symmetric"])
def test_tied_similarity_is_symmetric_and_semi_definite(similarity):
    attention = randomise(MinimalAttention(8, 2, similarity, dtype=torch.float64))
    q, k, _ = attention.project(torch.randn(1, 9, 8, dtype=torch.float64))
    scores = q @ k.transpose(-2, -1)
    torch.testing.assert_close(scores, scores.transpose(-2, -1))
    assert torch.linalg.eigvalsh(scores).min() > -1e-9


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_start_at_order_one(similarity, heads):
    attention = MinimalAttention(192, heads, similarity)
    q, k, _ = attention.project(torch.randn(4, 50, 192))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    own = scores.diagonal(dim1=-2, dim2=-1).mean().item()
    if similarity in ("shared", "symmetric"):
        assert own == pytest.approx(1, abs=0.15)
    else:
        assert scores.std().item() == pytest.approx(1, abs=0.15)
    assert attention.attention_weights(torch.randn(4, 50, 192)).amax() < 0.9


def test_shaped_attention_starts_as_the_identity():
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(MinimalAttention(8, 2, values="shaped")(x), x)


def test_without_values_tokens_stay_in_their_hull():
    attention = randomise(MinimalAttention(8, 1, "collapsed", "identity"))
    x = torch.randn(2, 5, 8)
    y = attention(x)
    assert (y <= x.amax(1, keepdim=True) + 1e-6).all()
    assert (y >= x.amin(1, keepdim=True) - 1e-6).all()


@pytest.mark.parametrize(
    ("similarity", "values", "heads", "parameters"),
    [  # C = 192: the table of variants
        ("pair", "projected", 3, 148_224),
        ("shared", "projected", 3, 111_168),
        ("collapsed", "projected", 1, 111_168),
        ("pair", "identity", 3, 74_112),
        ("collapsed", "identity", 1, 37_056),
        ("symmetric", "projected", 1, 92_640),
        ("symmetric", "identity", 1, 18_528),
        ("pair", "shaped", 3, 74_121),
        ("collapsed", "identity", 3, 3 * 37_056),
    ],
)
def test_parameters(similarity, values, heads, parameters):
    attention = MinimalAttention(192, heads, similarity, values)
    assert sum(p.numel() for p in attention.parameters()) == parameters


@pytest.mark.parametrize(
    ("similarity", "values", "products"),
    [  # C x C products a token: only what is not the same tensor is computed
        ("pair", "projected", 4),
        ("shared", "projected", 3),
        ("collapsed", "projected", 3),
        ("symmetric", "projected", 3),
        ("pair", "identity", 2),
        ("collapsed", "identity", 1),
        ("symmetric", "identity", 1),
    ],
)
def test_nothing_is_projected_twice(similarity, values, products):
    macs = count_macs(MinimalAttention(16, 1, similarity, values), (10, 16))
    assert macs == products * 10 * 16 * 16 + 2 * 10 * 10 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "cosine"}, "'pair', 'shared', 'collapsed', 'symmetric'"),
        ({"values": "none"}, "'projected', 'identity', 'shaped'"),
        ({"num_heads": 3}, r"must be divisible by num_heads \(3\)"),
    ],
)
def test_unknown_forms_say_what_is_known(arguments, message):
    with pytest.raises(InputError, match=message):
        MinimalAttention(8, **arguments)
