from __future__ import annotations

import pytest
import torch

import visionattn
from tools.carry_weights import main, rescale
from visionattn.models.span import SHIPPED


def test_filters_of_another_scale_are_interpolated():
    filters = torch.arange(3.0).repeat_interleave(16)[:, None, None, None].expand(48, 2, 3, 3)
    found = rescale(filters, 27, 3)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.arange(3.0).repeat_interleave(9))
    assert found.shape == (27, 2, 3, 3)
    assert rescale(filters[:, 0, 0, 0], 12, 3).shape == (12,)


def test_a_model_of_another_scale_gets_the_weights(tmp_path):
    source, new = str(SHIPPED / "va_span_ch26_x4.safetensors"), str(tmp_path / "new.safetensors")
    main([source, "va_span_ch26_x3", new, "--source", "va_span_ch26_x4"])
    image = torch.full((1, 3, 16, 16), 0.4)
    upscaled = visionattn.load(new, "va_span_ch26_x3").eval()(image)
    assert upscaled.shape == (1, 3, 48, 48)
    torch.testing.assert_close(upscaled[..., 20:28, 20:28], torch.full((1, 3, 8, 8), 0.4), rtol=0, atol=0.01)


def test_a_model_of_another_width_is_refused(tmp_path):
    source, new = str(SHIPPED / "va_span_ch26_x4.safetensors"), tmp_path / "new.safetensors"
    with pytest.raises(
        SystemExit, match=r"does not fit va_span_ch28_x4: \d+ tensors differ in shape, such as conv_1.conv.weight"
    ):
        main([source, "va_span_ch28_x4", str(new), "--source", "va_span_ch26_x4"])
    assert not new.exists()


def test_a_flow_network_matches_rows_as_the_stereo_network_matches_columns(tmp_path):
    """The correction of y by the attention's window is that of x, where only the window decides."""
    source, new = str(SHIPPED / "va_match_stereo_nano.safetensors"), str(tmp_path / "flow.safetensors")
    main([source, "va_match_flow_nano", new, "--source", "va_match_stereo_nano"])
    stereo = visionattn.load(source, "va_match_stereo_nano").state_dict()
    flow = visionattn.load(new, "va_match_flow_nano").state_dict()
    weight = "decoder.3.0.match_attention_cross.proj.weight"
    (x, y), window = flow[weight][-2:], 4 * 4 * 4
    torch.testing.assert_close(x, stereo[weight][-2], rtol=0, atol=0)
    torch.testing.assert_close(y[-window:].view(4, 4, 4), x[-window:].view(4, 4, 4).transpose(1, 2), rtol=0, atol=0)
    assert not y[:-window].any()
    changed = {key for key, value in flow.items() if not torch.equal(value, stereo.get(key, value))}
    assert {key.partition(".")[2].partition(".")[2].partition(".")[2] for key in changed} == {
        "field_scale",
        "match_attention_cross.proj.weight",
        "match_attention_self.proj.weight",
    }
