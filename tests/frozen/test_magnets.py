"""Rules for maps of conditions."""

import pytest
import torch

from visionattn.errors import InputError
from visionattn.frozen.magnets import append_magnets, drop_tokens, filter_sinks, shared_sinks


def test_magnets_are_appended_and_dropped():
    longer, indices = append_magnets(torch.zeros(2, 3, 4), torch.ones(2, 4))
    assert longer.shape == (2, 5, 4)
    assert longer[:, indices].eq(1).all()
    assert indices == [3, 4]
    weights = torch.tensor([[0.1, 0.1, 0.2, 0.3, 0.3], [0.0, 0.0, 0.0, 0.5, 0.5]])
    got = drop_tokens(weights, indices)
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.25, 0.5, 0, 0], [0.0, 0, 0, 0, 0]]))


def test_patches_that_every_token_looks_at_are_sinks():
    maps = torch.full((2, 12), 0.01)
    maps[:, 3] = 0.5
    maps[0, 7] = 0.4
    assert shared_sinks(maps).nonzero().flatten().tolist() == [3]
    got = filter_sinks(maps)
    assert got[:, 3].tolist() == [0, 0]
    torch.testing.assert_close(got.sum(-1), maps.sum(-1))
    assert got[0].argmax() == 7


def test_a_map_on_sinks_alone_stays():
    maps = torch.zeros(1, 12)
    maps[0, 2] = 1.0
    assert torch.equal(filter_sinks(maps), maps)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="from 0 to 2, but not all of them; got"):
        drop_tokens(torch.ones(2, 3), [3])
    with pytest.raises(InputError, match="from 0 to 2, but not all of them; got"):
        drop_tokens(torch.ones(2, 3), [0, 1, 2])
    with pytest.raises(InputError, match="width C of the condition"):
        append_magnets(torch.zeros(2, 3, 4), torch.ones(2, 5))
