"""SiLU cross-attention against a loop."""

import pytest
import torch
import torch.nn.functional as F

from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.silu_cross import silu_attention


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("keys", [3, 10, 70])
def test_definition(ratio, keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 6, dtype=torch.float64) for n in (4, keys, keys))
    expected = torch.zeros_like(q)
    for i in range(4):
        scores = [float((F.silu(q[0, 0, i]) * F.silu(k[0, 0, j])).sum()) for j in range(keys)]
        threshold = sorted(scores)[int(ratio * keys)]
        for j in range(keys):
            if scores[j] >= threshold:
                expected[0, 0, i] += scores[j] * v[0, 0, j]
    torch.testing.assert_close(silu_attention(q, k, v, ratio), expected, rtol=0, atol=1e-12)


def test_factors_and_embeddings():
    torch.manual_seed(0)
    mixer = MIXERS["silu_cross"](16, 1, num_context_tokens=9, alpha=0.3, beta=0.2, dtype=torch.float64)
    torch.nn.init.normal_(mixer.value_embedding)
    x, context = torch.randn(2, 4, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    keys, values = 0.2 * context + mixer.key_embedding, 0.2 * context + mixer.value_embedding
    expected = 0.3 * silu_attention(x[:, None], keys[:, None], values[:, None], 0.1)[:, 0]
    torch.testing.assert_close(mixer(x, (2, 2), context), expected, rtol=0, atol=1e-12)
    assert mixer.extra_parameters() == 2 * 9 * 16
    with pytest.raises(InputError, match="those of 9 context tokens; got 4"):
        mixer(x, (2, 2))


def test_bad_settings():
    with pytest.raises(InputError, match="ratio must be at least 0 and below 1; got 1"):
        MIXERS["silu_cross"](8, 1, ratio=1)
