"""Heads against their equations, and what they must do to a shifted grid."""

import pytest
import torch

from visionattn.errors import UnknownNameError
from visionattn.probe.segmentation.heads import SEGMENTERS, create_segmenter, interpolate


def made(name, seed=0, dim=6, classes=3):
    head = create_segmenter(name, dim, classes, seed).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        head.norm.running_mean.copy_(torch.randn(dim, generator=generator, dtype=torch.float64))
        head.norm.running_var.copy_(torch.rand(dim, generator=generator, dtype=torch.float64) + 0.5)
    return head


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_equations(name):
    head = made(name)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = head(tokens)
    assert logits.shape == (2, 5, 3)
    for image, found in zip(tokens, logits):
        x = (image - head.norm.running_mean) / (head.norm.running_var + 1e-6).sqrt()
        for k in range(3):
            w = head.classifier.weight[k]
            if name == "attentive":
                shares = (x @ head.queries[k] / 6**0.5).softmax(0)
                w = w + head.value.weight @ (shares @ x)
            expected = x @ w + head.classifier.bias[k]
            torch.testing.assert_close(found[:, k], expected)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_shifted_grid_has_shifted_logits(name):
    head, grid = made(name), (4, 5)
    tokens = torch.randn(1, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shifted = tokens.unflatten(1, grid).roll((1, 2), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(head(shifted), head(tokens).unflatten(1, grid).roll((1, 2), (1, 2)).flatten(1, 2))


def test_the_attentive_head_starts_as_the_linear_one():
    tokens = torch.randn(2, 9, 8)
    linear, attentive = (create_segmenter(name, 8, 4, seed=3) for name in ("linear", "attentive"))
    torch.testing.assert_close(linear(tokens), attentive(tokens))
    assert sum(p.numel() for p in linear.parameters()) == 8 * 4 + 4
    assert sum(p.numel() for p in attentive.parameters()) == 8 * 4 + 4 + 4 * 8 + 8 * 8


def test_interpolation_puts_boundaries_between_patches():
    logits = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 0], [1, 0], [0, 1]]])  # a grid of 2 x 3, two classes
    assert interpolate(logits, (2, 3), (2, 3))[0].argmax(0).tolist() == [[0, 0, 1]] * 2
    said = interpolate(logits, (2, 3), (8, 12))[0].argmax(0)
    assert torch.equal(said, torch.tensor([0] * 8 + [1] * 4).expand(8, 12))


def test_unknown_head():
    with pytest.raises(UnknownNameError, match="must be one of 'linear', 'attentive'; got 'ep_32'"):
        create_segmenter("ep_32", 8, 4)
