"""Attention maps: each panel shows what its query was given."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionattn.errors import InputError
from visionattn.probe.heads.banks import HeadSpec, create_head
from visionattn.probe.report.maps import attention_of, overlay
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Layer, Tokens

LAYER = Layer("last", 8, (2, 3), has_class=True)


def tokens():
    return Tokens(torch.randn(2, 6, 8), torch.randn(2, 8))


def test_attention_is_softmax_of_queries_and_tokens():
    head, given = create_head(HeadSpec("ep_4"), LAYER, 3).eval(), tokens()
    attention = attention_of(head, given)
    expected = (head.pooling.queries @ given.patches.transpose(1, 2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(attention, expected.detach())
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4))


def test_the_share_of_a_class_token_is_left_out():
    head, given = create_head(HeadSpec("ep_all_4"), LAYER, 3).eval(), tokens()
    every = torch.cat([given.class_token[:, None], given.patches], dim=1)
    expected = (head.pooling.queries @ every.transpose(1, 2) / 8**0.5).softmax(-1)[:, :, 1:]
    torch.testing.assert_close(attention_of(head, given), expected.detach())


@pytest.mark.parametrize("pooling", ["ep_4", "ep_all_4"])
def test_registers_of_dinov2_are_in_no_map(pooling):
    torch.manual_seed(0)
    options = {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2}
    backbone = Backbone(timm.create_model("vit_small_patch14_reg4_dinov2", **options), image_size=28)
    (given,) = backbone(torch.randn(2, 3, 28, 28))
    assert given.registers.shape == (2, 4, 24)
    head = create_head(HeadSpec(pooling), backbone.layers[0], 3).eval()
    attention = attention_of(head, given)
    assert attention.shape == (2, 4, 4)  # 2 x 2 patches
    assert torch.equal(attention, attention_of(head, given._replace(registers=given.registers + 100)))


def test_other_poolings_have_no_queries():
    with pytest.raises(InputError, match="Mean has no queries"):
        attention_of(create_head(HeadSpec("gap"), LAYER, 3), tokens())


def test_a_panel_is_yellow_where_its_query_looks_and_the_picture_elsewhere():
    image = Image.new("L", (120, 120), 90)
    attention = torch.full((2, 9), 0.05)
    attention[0, 2] = attention[1, 6] = 0.6  # top right, bottom left
    sheet = np.asarray(overlay(image, attention, (3, 3))).astype(int)
    assert sheet.shape == (120, 3 * 120 + 2 * 4, 3)
    corners = {"top right": (slice(10, 20), slice(100, 110)), "bottom left": (slice(100, 110), slice(10, 20))}
    for number, looked, other in ((1, "top right", "bottom left"), (2, "bottom left", "top right")):
        panel = sheet[:, 124 * number : 124 * number + 120]
        red, green, blue = panel[corners[looked]].mean((0, 1))
        assert min(red, green) > 180
        assert blue < 40
        np.testing.assert_allclose(panel[corners[other]], 90, atol=1)
    np.testing.assert_array_equal(sheet[:, :120], 90)


def test_grids_need_not_be_square():
    sheet = overlay(Image.new("RGB", (300, 200)), torch.rand(1, 6), (2, 3))
    assert sheet.size == (604, 200)


def test_attention_of_another_grid_is_refused():
    with pytest.raises(InputError, match=r"shape \(M, 4\) for 2 x 2 patches; got \(1, 6\)"):
        overlay(Image.new("RGB", (8, 8)), torch.rand(1, 6), (2, 2))
