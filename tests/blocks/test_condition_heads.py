"""Heads beside conditional cross-attention: the contract, and each method's definition, image by image."""

import pytest
import torch
from torch.nn import functional as F

from tests.blocks.contract import BlockContract, randomise
from visionattn.blocks import AttributeSpecificAttention, ConditionalSimilarityMask, ConditionLinear
from visionattn.errors import InputError

BLOCKS = [ConditionLinear, ConditionalSimilarityMask, AttributeSpecificAttention]


class Heads:
    @staticmethod
    def inputs(batch, size):
        return torch.randn(batch, size, 8)

    def output_shape(self, case, x):
        return len(x), case["num_conditions"], case["embed_dim"]


class TestConditionLinear(Heads, BlockContract):
    block = ConditionLinear
    cases = [
        {"dim": 8, "num_conditions": 3, "embed_dim": 5},
        {"dim": 8, "num_conditions": 2, "embed_dim": 5, "class_token": True},
    ]


class TestConditionalSimilarityMask(Heads, BlockContract):
    block = ConditionalSimilarityMask
    cases = [
        {"dim": 8, "num_conditions": 3, "embed_dim": 16},
        {"dim": 8, "num_conditions": 2, "embed_dim": 16, "masks": "blocks", "class_token": True},
    ]

    def make(self, case, **kwargs):
        block = super().make(case, **kwargs)
        for row in block.table.rows:
            row.data.add_(0.3)  # a mask of zeros has no direction
        return block


class TestAttributeSpecificAttention(Heads, BlockContract):
    block = AttributeSpecificAttention
    cases = [{"dim": 8, "num_conditions": 3, "embed_dim": 5, "width": 6}]


def double(block, **kwargs):
    return randomise(block(12, 4, embed_dim=8, dtype=torch.float64, **kwargs)), torch.randn(3, 7, 12).double()


@pytest.mark.parametrize("class_token", [False, True])
def test_linear_is_a_linear_layer_a_condition(class_token):
    head, tokens = double(ConditionLinear, class_token=class_token)
    pooled = tokens[:, 0] if class_token else tokens.mean(1)
    for c, row in enumerate(head.table.rows):
        layer = torch.nn.Linear(12, 8, dtype=torch.float64)
        layer.load_state_dict({"weight": row[:, :12], "bias": row[:, 12]})
        torch.testing.assert_close(head(tokens)[:, c], F.normalize(layer(pooled)))


@pytest.mark.parametrize("class_token", [False, True])
def test_masks_choose_dimensions(class_token):
    head, tokens = double(ConditionalSimilarityMask, class_token=class_token)
    found = head(tokens)
    for b, image in enumerate(tokens):
        x = head.proj.weight @ (image[0] if class_token else image.sum(0) / 7) + head.proj.bias
        for c, row in enumerate(head.table.rows):
            masked = torch.stack([value * max(m, 0 * m) for value, m in zip(x, row)])
            torch.testing.assert_close(found[b, c], masked / masked.square().sum().sqrt())


def test_masks_start_as_the_authors_do():
    rows = torch.stack([*ConditionalSimilarityMask(4, 64, 1024).table.rows]).detach()
    assert rows.mean().item() == pytest.approx(0.9, abs=0.01)
    assert rows.std().item() == pytest.approx(0.7, abs=0.01)
    for masks, outside in (("blocks", 0.1), ("fixed", 0.0)):
        table = ConditionalSimilarityMask(4, 3, 10, masks).table
        expected = torch.full((3, 10), outside)
        for c in range(3):
            expected[c, 3 * c : 3 * c + 3] = 1
        assert torch.equal(torch.stack([*table.rows]), expected)
        assert all(row.requires_grad == (masks == "blocks") for row in table.rows)


def test_attributes_attend_to_places_then_channels():
    head, tokens = double(AttributeSpecificAttention, width=5)
    found = head(tokens)
    for b, image in enumerate(tokens):
        for c, a in enumerate(head.table.rows):
            question = torch.tanh(head.query.weight @ a + head.query.bias)
            scores = [question @ torch.tanh(head.key.weight @ x + head.key.bias) / 5**0.5 for x in image]
            shares = torch.stack(scores).exp() / sum(score.exp() for score in scores)
            x = sum(share * token for share, token in zip(shares, image))
            both = torch.cat([x, (head.channel.weight @ a + head.channel.bias).relu()])
            hidden = (head.fc1.weight @ both + head.fc1.bias).relu()
            gate = 1 / (1 + torch.exp(-(head.fc2.weight @ hidden + head.fc2.bias)))
            f = head.proj.weight @ (gate * x) + head.proj.bias
            torch.testing.assert_close(found[b, c], f / f.norm())


@pytest.mark.parametrize("block", BLOCKS)
def test_many_conditions_are_single_ones(block):
    head, tokens = double(block)
    every = head(tokens)
    for c in range(4):
        torch.testing.assert_close(head(tokens, torch.tensor([c])), every[:, [c]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_one_more_condition_leaves_the_others_alone(block):
    head, tokens = block(12, 4, embed_dim=8), torch.randn(3, 7, 12)
    ids = torch.arange(4)
    before = head(tokens, ids)
    new = head.add_conditions(2)
    assert len(new) == 2
    assert head(tokens).shape == (3, 6, 8)
    assert torch.equal(head(tokens, ids), before)


def test_wrong_masks():
    with pytest.raises(InputError, match="masks must be one of 'learned', 'blocks', 'fixed'; got 'none'"):
        ConditionalSimilarityMask(4, 2, masks="none")
    with pytest.raises(InputError, match=r"embed_dim .8. must be at least num_conditions .9."):
        ConditionalSimilarityMask(4, 9, embed_dim=8, masks="fixed")
    with pytest.raises(InputError, match="all dimensions are in use: use masks='learned'"):
        ConditionalSimilarityMask(4, 2, masks="fixed").add_conditions()
