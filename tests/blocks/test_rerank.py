"""The pair encoder: late interaction patch by patch, what it starts as, and that both orders are heard."""

import pytest
import torch
import torch.nn.functional as F

from tests.blocks.contract import randomise
from visionattn.blocks.rerank import PairEncoder, late_interaction


def pairs(count=3):
    return torch.randn(count, 5, 8), torch.randn(count, 4, 8)


def test_late_interaction_patch_by_patch():
    first, second = pairs()
    for a, b, found in zip(first, second, late_interaction(first, second)):
        best = [max(F.cosine_similarity(p, q, dim=0) for q in b) for p in a]
        torch.testing.assert_close(found, torch.stack(best).mean())


def test_late_interaction_of_an_image_with_itself_is_1():
    first, _ = pairs()
    torch.testing.assert_close(late_interaction(first, first), torch.ones(3))


def test_untrained_it_ranks_as_late_interaction_of_standardised_patches():
    first, second = pairs(16)
    first, second = 5 * first + 3, 5 * second + 3
    encoder = PairEncoder(8, 16, 1).eval()
    encoder.standardise_by(torch.cat([first, second], dim=1))
    every = torch.cat([first, second], dim=1).flatten(0, 1)
    standard = [(patches - every.mean(0)) / every.std(0) for patches in (first, second)]
    late = (late_interaction(*standard) + late_interaction(*standard[::-1])) / 2
    torch.testing.assert_close(encoder(first, second), 4 * late)


def test_compare_does_not_depend_on_the_order_but_a_pass_does():
    encoder = randomise(PairEncoder(8, 16, 2)).eval()
    first, second = pairs()
    assert not torch.allclose(encoder(first, second), encoder(second, first))
    torch.testing.assert_close(encoder.compare(first, second), encoder.compare(second, first))


def test_patches_have_no_order():
    encoder = randomise(PairEncoder(8, 16, 2)).eval()
    first, second = pairs()
    torch.testing.assert_close(encoder(first[:, [2, 0, 4, 1, 3]], second.flip(1)), encoder(first, second))


def test_pairs_do_not_mix_and_every_parameter_has_a_gradient():
    encoder = randomise(PairEncoder(8, 16, 2)).eval()
    first, second = pairs()
    torch.testing.assert_close(encoder(first, second)[1:2], encoder(first[1:2], second[1:2]))
    encoder(first, second).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("width", [0, 8, 24])
def test_widths_that_heads_do_not_divide_are_refused(width):
    with pytest.raises(ValueError, match=f"divisible by 16; got {width}"):
        PairEncoder(8, width)
