"""Attention calls of frozen models: names, grids, replacement in eager, compiled and exported models."""

import threading

import pytest
import timm
import torch
from torch import nn

from visionattn.errors import InputError
from visionattn.frozen import observing, replacing

PREFIXES = {
    "vit_tiny_patch16_224": 1,
    "deit_tiny_distilled_patch16_224": 2,
    "vit_small_patch14_reg4_dinov2": 5,
    "vit_small_patch16_dinov3": 5,
    "eva02_tiny_patch14_224": 1,
    "beit_base_patch16_224": 1,
    "vit_base_patch16_siglip_224": 0,
}


def vit(size: int = 48, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5, **kwargs}
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, **kwargs).eval()
    nn.init.normal_(model.head.weight)
    return model


def nearest_five(call):
    """Softmax over the five largest logits."""
    logits = call.q @ call.k.transpose(-1, -2) * call.scale
    least = logits.topk(5, -1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1) @ call.v


@pytest.mark.parametrize("name", PREFIXES)
def test_layers_grid_and_prefix(name):
    patch = 14 if "14" in name else 16
    model = timm.create_model(name, img_size=(3 * patch, 2 * patch), depth=2, num_classes=0).eval()
    calls, images = [], torch.randn(2, 3, 3 * patch, 2 * patch)
    with torch.no_grad():
        before = model(images)
        with observing(model, calls.append, "blocks.*") as reached:
            after = model(images)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert reached.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert [(call.grid, call.prefix, call.number) for call in calls] == [
        ((3, 2), PREFIXES[name], 0),
        ((3, 2), PREFIXES[name], 1),
    ]
    assert all((call.bias is not None) == name.startswith("beit") for call in calls)


def test_observed_tensors_compute_the_attention_and_gradients_flow():
    model, images, seen = vit(), torch.randn(2, 3, 48, 48), []
    outputs = []
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    with observing(model, seen.append, layers=["blocks.1.attn"]) as reached:
        model(images).sum().backward()
    (call,) = seen
    expected = (call.q @ call.k.transpose(-1, -2) * call.scale).softmax(-1) @ call.v
    torch.testing.assert_close(outputs[0], expected.transpose(1, 2).flatten(2))
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert list(reached.dense) == ["blocks.0.attn", "blocks.2.attn"]


def test_one_state_for_every_forward_pass():
    model, states = vit(), []

    def count(call):
        call.state[call.number] = True
        states.append(len(call.state))

    with torch.no_grad(), observing(model, count):
        model(torch.randn(1, 3, 48, 48))
        model(torch.randn(1, 3, 48, 48))
    assert states == [1, 2, 3, 1, 2, 3]


def test_eager_compiled_and_exported_models_agree():
    model, images = vit(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        dense = model(images)
        with replacing(model, nearest_five, "blocks.[01].attn") as reached:
            eager = model(images)
            # This backend runs the unchanged calls within the context once more.
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            twice = [compiled(images), compiled(images)]
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert reached.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert list(reached.dense) == ["blocks.2.attn"]
    assert (eager - dense).abs().max() > 1e-3
    for found in (*twice, program.module()(images)):
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    exported = program.module()(images.repeat(2, 1, 1, 1)[:3])
    torch.testing.assert_close(exported[2], eager[0], rtol=1e-5, atol=1e-5)
    assert not model.blocks[0].attn._forward_hooks
    assert not model.patch_embed._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense, rtol=0, atol=0)


def test_gradients_and_dropout_are_refused():
    model, images = vit(attn_drop_rate=0.5), torch.randn(1, 3, 48, 48)
    message = r"blocks\.0\.attn requires gradients.*no_grad"
    with pytest.raises(InputError, match=message), replacing(model, nearest_five):
        model(images)
    with pytest.raises(InputError, match=r"model\.eval\(\)"), torch.no_grad(), replacing(model, nearest_five):
        model.train()(images)
    assert not model.blocks[0].attn._forward_hooks


def test_names_continue_after_a_failed_forward_pass():
    model, seen = vit(), []
    with torch.no_grad(), observing(model, seen.append):
        with pytest.raises(AssertionError):
            model(torch.randn(1, 3, 40, 40))
        model(torch.randn(1, 3, 48, 48))
    assert [call.layer for call in seen] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def test_unfused_layers_are_reached_and_stay_unfused():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), observing(model, lambda call: None) as reached:
        model(torch.randn(1, 3, 48, 48))
    assert len(reached.layers) == 3
    assert not any(block.attn.fused_attn for block in model.blocks)


def test_windows_have_no_grid():
    model = timm.create_model("samvit_base_patch16", img_size=64, depth=2, global_attn_indexes=(1,), window_size=2)
    calls = []
    with torch.no_grad(), observing(model.eval(), calls.append):
        model(torch.randn(1, 3, 64, 64))
    assert [call.grid for call in calls] == [None, (4, 4)]
    assert calls[1].q.shape == (12, 1, 16, 64)
    assert calls[1].bias.shape == (12, 1, 16, 16)


def test_layers_that_are_not_reached_are_named():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(1, 4, 8)
    match = r"No attention layer of Silent was reached: attention do not call .*scaled_dot_product"
    model = Silent()
    with pytest.raises(InputError, match=match), torch.no_grad(), observing(model, print):
        model(x)
    with pytest.raises(InputError, match=r"layers is 'blocks\.9\*'.*blocks\.0\.attn"), torch.no_grad():
        model = vit()
        with observing(model, print, "blocks.9*"):
            model(torch.randn(1, 3, 48, 48))


def test_of_two_contexts_the_inner_one_comes_first():
    for options in ({}, {"class_token": False, "global_pool": "avg"}):
        model, x = vit(**options), torch.randn(1, 3, 48, 48)
        with torch.no_grad(), replacing(model, lambda call: call.v) as outer:
            with replacing(model, lambda call: 2 * call.v, "blocks.0.*") as inner:
                model(x)
        assert inner.layers == ["blocks.0.attn"]
        assert outer.layers == [f"blocks.{n}.attn" for n in range(1, len(model.blocks))]
        assert outer.dense == {"blocks.0.attn": "an inner context replaces it"}
        with torch.no_grad(), observing(model, print) as outer, replacing(model, lambda call: call.v) as inner:
            model(x)
        assert (outer.layers, len(outer.dense), len(inner.layers)) == ([], len(model.blocks), len(model.blocks))


def test_other_threads_run_the_model_as_it_is():
    model, x, small = vit(dynamic_img_size=True), torch.randn(1, 3, 48, 48), torch.randn(1, 3, 24, 24)
    calls = []
    with torch.no_grad():
        dense = model(small)

    def elsewhere():
        with torch.no_grad():
            assert torch.equal(model(small), dense)

    def in_a_thread(*unused):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    def once(*unused):
        handle.remove()
        in_a_thread()

    handle = model.blocks[0].norm1.register_forward_hook(once)
    with torch.no_grad(), observing(model, calls.append) as reached:
        model(x)
    assert reached.layers == [f"blocks.{n}.attn" for n in range(len(model.blocks))]
    assert {call.grid for call in calls} == {(6, 6)}
    with pytest.raises(InputError, match="ran in another thread only"), observing(model, print):
        in_a_thread()


def test_a_model_without_attention_is_refused():
    model = timm.create_model("test_resnet", num_classes=0).eval()
    with pytest.raises(InputError, match="No attention layer of ResNet was reached: no layer calls"), torch.no_grad():
        with replacing(model, lambda call: call.v):
            model(torch.randn(1, 3, 64, 64))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    match = "No attention layer of Sequential was reached: no layer calls"
    with pytest.raises(InputError, match=match), torch.no_grad(), replacing(plain, lambda call: None):
        plain(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("layers", [None, 5, [5]])
def test_layers_are_patterns(layers):
    with pytest.raises(InputError, match="layers must be a pattern of names"), observing(vit(), print, layers):
        pass
