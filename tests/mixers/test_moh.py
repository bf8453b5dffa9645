"""Mixture of heads against its definition token by token, its balance loss and its control."""

import pytest
import torch

from tests.mixers.contract import randomise
from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.core import softmax_attention


def gates(mixer, x, shared: int, routed: int, form: str) -> list[float]:
    """Gates of one token, as written."""
    heads = mixer.num_heads
    one = (mixer.wg_1(x).softmax(dim=-1) if shared > 1 else torch.ones(shared).double()).tolist()
    p = mixer.wg(x).softmax(dim=-1)
    chosen = set(p.topk(routed).indices.tolist())
    total = sum(p[i].item() for i in chosen)
    a, b = mixer.wg_0(x).softmax(dim=-1).tolist() if shared else (1.0, 1.0)
    if form == "code" and shared:
        a, b = 2 * a, 2 * b
    scale = (shared, routed / total) if form == "code" else (1, 1)
    rest = [b * p[i].item() * scale[1] if i in chosen else 0.0 for i in range(heads - shared)]
    return [a * g * scale[0] for g in one] + rest


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(("shared", "routed"), [(0, 2), (1, 2), (3, 2), (3, 3)])
def test_definition(shared, routed, form):
    torch.manual_seed(0)
    settings = {"shared_heads": shared, "routed_heads": routed, "form": form}
    mixer = randomise(MIXERS["moh"](24, 6, **settings, dtype=torch.float64))
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    y = softmax_attention(*mixer.project(x, None))
    weights = [[gates(mixer, token, shared, routed, form) for token in sample] for sample in x]
    y = y.transpose(1, 2) * torch.tensor(weights, dtype=torch.float64)[..., None]
    torch.testing.assert_close(mixer(x, (3, 4)), mixer.proj(y.flatten(2)), rtol=0, atol=1e-10)
    assert (mixer.gates(x) > 0).sum(dim=-1).unique().tolist() == [shared + routed]


def test_balance_loss():
    torch.manual_seed(0)
    mixer = randomise(MIXERS["moh"](24, 6, shared_heads=2, routed_heads=2, dtype=torch.float64))
    x = torch.randn(2, 50, 24, dtype=torch.float64)
    p = mixer.wg(x).softmax(dim=-1).flatten(0, 1)
    f = torch.zeros(4).double()
    for token in p:
        f[token.topk(2).indices] += 1 / 100
    torch.testing.assert_close(mixer.balance_loss(x), 4 * (p.mean(dim=0) * f).sum())
    torch.nn.init.zeros_(mixer.wg.weight)
    torch.testing.assert_close(mixer.balance_loss(x), torch.tensor(2.0).double())
    assert MIXERS["gated_heads"](24, 6).balance_loss(x.float()) == 0


def test_dense_gates_average_one():
    mixer = randomise(MIXERS["gated_heads"](24, 6))
    torch.testing.assert_close(mixer.gates(torch.randn(2, 5, 24)).mean(dim=-1), torch.ones(2, 5))
    assert mixer.extra_parameters() == 24 * 6


def test_bad_settings():
    with pytest.raises(InputError, match="together 1 to 4; got 2 and 3"):
        MIXERS["moh"](8, 4, shared_heads=2, routed_heads=3)
    with pytest.raises(InputError, match="all 4 heads must be shared; got shared_heads=2"):
        MIXERS["moh"](8, 4, shared_heads=2, routed_heads=0)
    with pytest.raises(InputError, match="form must be one of 'code', 'paper'; got 'book'"):
        MIXERS["moh"](8, 4, form="book")
