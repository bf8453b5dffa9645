"""The six deconstructed forms against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.mixers.contract import DIM, GRID, HEADS, make
from visionattn.errors import InputError
from visionattn.mixers import MIXERS

X = torch.randn(2, 15, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def projected(mixer):
    return [t.unflatten(-1, (HEADS, 4)).transpose(1, 2) for t in mixer.qkv(X).chunk(3, dim=-1)]


def out(mixer, y):
    return mixer.proj(y.transpose(1, 2).flatten(2))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_mlp():
    mixer = make("mlp", {}, dtype=torch.float64)
    close(mixer(X, GRID), mixer.down(F.silu(mixer.gate(X)) * mixer.up(X)))
    assert MIXERS["mlp"](192, 3, qkv_bias=False).extra_parameters() == 0


@pytest.mark.parametrize("orders", ["together", "separate"])
def test_taylor(orders):
    mixer = make("taylor", {"orders": orders}, dtype=torch.float64)
    q, k, v = projected(mixer)
    s = q @ k.transpose(-2, -1) / 2
    terms = [torch.ones_like(s), s, s**2 / 2]
    if orders == "together":
        weights = sum(terms) / sum(terms).sum(dim=-1, keepdim=True)
    else:
        weights = sum(term / term.sum(dim=-1, keepdim=True) for term in terms)
    torch.testing.assert_close(mixer(X, GRID), out(mixer, weights @ v), rtol=1e-9, atol=1e-12)


def test_taylor_of_small_logits_is_softmax_attention():
    mixer = make("taylor", {}, dtype=torch.float64)
    softmax = MIXERS["softmax"](DIM, HEADS, dtype=torch.float64)
    with torch.no_grad():
        mixer.qkv.weight[:DIM] *= 1e-3
        mixer.qkv.bias[:DIM] *= 1e-3
    softmax.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(X, GRID), softmax(X, GRID), rtol=0, atol=1e-7)


def test_key_only():
    mixer = make("key_only", {}, dtype=torch.float64)
    q, k, v = projected(mixer)
    weights = ((F.silu(q) * k).sum(dim=-1) / math.sqrt(4)).softmax(dim=-1)
    vector = (weights[..., None] * v).sum(dim=2, keepdim=True)
    close(mixer(X, GRID), out(mixer, vector.expand_as(v)))


def test_maps_of_references_do_not_depend_on_the_input():
    mixer = make("random_qk", {"grid_size": GRID}, dtype=torch.float64)
    reference = mixer.source.flatten(2).transpose(1, 2)
    q, k, _ = mixer.project(reference, None)
    weights = (q @ k.transpose(-2, -1) / 2).softmax(dim=-1)
    close(mixer(X, GRID), out(mixer, weights @ projected(mixer)[2]))


def test_random_embeddings_follow_the_seed():
    one, same, other = (MIXERS["random_qk"](DIM, HEADS, grid_size=GRID, seed=seed).source for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_input_as_its_own_reference_is_softmax_attention(prefix):
    mixer = make("fixed_qk", {"grid_size": GRID}, dtype=torch.float64)
    softmax = MIXERS["softmax"](DIM, HEADS, dtype=torch.float64)
    softmax.load_state_dict(mixer.state_dict(), strict=False)
    x = torch.randn(1, prefix + 15, DIM, dtype=torch.float64)
    mixer.set_source(x)
    close(mixer(x, GRID), softmax(x, GRID))
    with pytest.raises(InputError, match=r"tokens must have the shape \(1, P \+ 15, 12\)"):
        mixer.set_source(x[:, :9])


def test_static_source():
    mixer = make("static_qk", {}, dtype=torch.float64)
    first = torch.randn_like(X)
    mixer.source = first
    q, k, _ = mixer.project(first, None)
    close(mixer(X, GRID), out(mixer, (q @ k.transpose(-2, -1) / 2).softmax(dim=-1) @ projected(mixer)[2]))


def test_bad_settings():
    with pytest.raises(InputError, match="orders must be one of 'together', 'separate'; got 'none'"):
        MIXERS["taylor"](8, 2, orders="none")
    with pytest.raises(InputError, match="grid_size must be at least 1"):
        MIXERS["fixed_qk"](8, 2, grid_size=0)
