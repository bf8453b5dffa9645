"""DCAL: the plain ViT to the last bit, branches by their definitions, read-outs, plain weights, bad input."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn
from tests.blocks.contract import randomise
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError

NANO = "va_dcal_nano_patch4_32"
# All parameters, and those of GLCA's branch.
COSTS = {
    "va_dcal_deit_tiny_patch16_224": (6_355_664, 638_248),
    "va_dcal_deit_small_patch16_224": (24_210_896, 2_160_232),
    "va_dcal_deit_base_patch16_224": (94_426_064, 7_858_408),
    NANO: (358_804, 50_762),
}


def build(**kwargs):
    model = randomise(timm.create_model(NANO, **kwargs)).eval()
    for p in model.parameters():
        p.data.mul_(0.3)
    return model, torch.randn(3, 3, 32, 32, dtype=kwargs.get("dtype"))


def plain(model):
    """timm's own ViT with the weights of the SA branch."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
    vit = timm.models.VisionTransformer(**arguments).eval()
    vit.load_state_dict({key: model.state_dict()[key] for key in vit.state_dict()})
    return vit


@pytest.mark.parametrize("name", COSTS)
def test_parameters(name):
    model = timm.create_model(name, device="meta")
    assert count_parameters(model) == COSTS[name][0]
    local = [p for key, p in model.named_parameters() if key.startswith(("glca.", "norm_local.", "head.local."))]
    assert sum(p.numel() for p in local) == COSTS[name][1]
    if "deit" in name:
        vit = timm.create_model(name.removeprefix("va_dcal_"), device="meta")
        assert count_parameters(vit) == COSTS[name][0] - COSTS[name][1]


def test_the_papers_share_of_glca():
    """It says 9 % more parameters and 2 % more operations, DeiT-T on CUB: 200 classes, 448 x 448, R = 10 %."""
    arguments = {"num_classes": 200, "img_size": 448, "device": "meta"}
    model = timm.create_model("va_dcal_deit_tiny_patch16_224", local_pool="avg", **arguments)
    vit = timm.create_model("deit_tiny_patch16_224", **arguments)
    assert count_parameters(model) / count_parameters(vit) == pytest.approx(1.09, abs=0.005)
    block = model.glca
    tokens, local = torch.empty(1, 785, 192, device="meta"), torch.empty(1, 79, 192, device="meta")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        block(local, tokens)
    assert counter.get_total_flops() / 2 / count_macs(vit, (3, 448, 448)) == pytest.approx(0.02, abs=0.005)


def test_sa_only_is_the_plain_vit_to_the_last_bit():
    model, x = build(sa_only=True)
    vit = plain(model)
    assert torch.equal(model(x), vit(x))
    assert torch.equal(model.forward_features(x), vit.forward_features(x))
    assert torch.equal(model.embed(x), vit.forward_features(x)[:, 0])
    # The branch of a model that has both is the same.
    both = build()[0]
    both.load_state_dict(model.state_dict())
    for pool in ("token", "avg"):
        both.local_pool = pool
        assert torch.equal(both.forward_features(x)[:, :-1], vit.forward_features(x))
    both.sa_only = True
    assert torch.equal(both(x), vit(x))


def test_training_with_pairs_changes_nothing_in_inference():
    model, x = build()
    before = model(x)
    model.forward_branches(x)
    assert torch.equal(model(x), before)


def test_logits_are_the_log_of_the_mean_probability():
    model, x = build()
    branches = model.branch_logits(model.forward_branches(x))
    expected = (branches.sa.softmax(-1) + branches.glca.softmax(-1)) / 2
    torch.testing.assert_close(model(x).exp(), expected)
    torch.testing.assert_close(model(x).softmax(-1), expected)
    torch.testing.assert_close(branches.sa, plain(model)(x))
    assert torch.equal(model.embed(x), torch.cat(model.forward_branches(x)[:2], 1))
    assert (branches.glca - branches.sa).abs().max() > 0.01


def blocks_by_definition(model, x):
    """Tokens of SA after each block, the input first."""
    found = [model._pos_embed(model.patch_embed(x))]
    for block in model.blocks:
        found.append(block(found[-1]))
    return found


@pytest.mark.parametrize("partner", [None, [1, 2, 0]])
def test_pairs(partner):
    """PWCA image by image: queries of one, keys and values of both, all blocks with the weights of SA."""
    model, x = build(dtype=torch.float64)
    found = model.forward_branches(x, None if partner is None else torch.tensor(partner)).pwca
    partners = [2, 0, 1] if partner is None else partner
    streams = list(model._pos_embed(model.patch_embed(x)).unbind(0))
    for block in model.blocks:
        new = []
        for b, stream in enumerate(streams):
            both = block.norm1(torch.cat([stream, streams[partners[b]]]))
            q = block.attn.qkv(both[: len(stream)])[:, :64].unflatten(-1, (4, 16)).transpose(0, 1)
            k, v = block.attn.qkv(both)[:, 64:].unflatten(-1, (2, 4, 16)).permute(1, 2, 0, 3)
            y = (q @ k.transpose(1, 2) / 4).softmax(-1) @ v
            y = stream + block.attn.proj(y.transpose(0, 1).flatten(1))
            new.append(y + block.mlp(block.norm2(y)))
        streams = new
    expected = torch.stack([model.norm(stream)[0] for stream in streams])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_glca_reads_selected_patches(ratio):
    """Roll-out as a product of whole matrices, selection by sorting, their mean with the class token."""
    model, x = build(dtype=torch.float64, local_pool="avg", local_ratio=ratio)
    steps = blocks_by_definition(model, x)
    product = torch.eye(65, dtype=torch.float64)
    for block, tokens in zip(model.blocks, steps):
        q, k, _ = block.attn.split(block.norm1(tokens))
        shares = (q @ k.transpose(-1, -2) / 4).softmax(-1).mean(1)
        product = (0.5 * shares + 0.5 * torch.eye(65)) @ product
    order = product[:, 0, 1:].argsort(1, descending=True)[:, : int(ratio * 64)] + 1
    for b in range(3):
        local = torch.cat([steps[-1][b, :1], steps[-1][b, order[b]]])
        expected = model.norm_local(model.glca(local[None], steps[-1][b : b + 1])[0].mean(0))
        torch.testing.assert_close(model.forward_features(x)[b, -1], expected, rtol=0, atol=1e-12)
    token = copy.deepcopy(model)
    token.local_pool = "token"
    assert (token(x) - model(x)).abs().max() > 1e-4
    assert (model.decides, timm.create_model(NANO).decides) == (True, False)


def test_the_class_token_does_not_depend_on_the_selection():
    """Why nothing is selected for it: queries of one block do not see each other."""
    model, x = build(dtype=torch.float64)
    tokens = blocks_by_definition(model, x)[-1]
    for others in ([], [5, 9, 11], list(range(1, 65))):
        local = model.glca(tokens[:, [0, *others]], tokens)[:, 0]
        torch.testing.assert_close(model.norm_local(local), model.forward_features(x)[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_every_parameter_learns(pool):
    model, x = build(local_pool=pool)
    model(x).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    alone = copy.deepcopy(model)
    alone.zero_grad()
    alone.set_grad_checkpointing()
    model.zero_grad()
    for network in (model, alone):
        sum(logits.square().sum() for logits in network.branch_logits(network.forward_branches(x))).backward()
    for (key, p), q in zip(model.named_parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


def test_plain_weights_load(tmp_path):
    """By a bare load, and for other classes with timm's own `pretrained`; GLCA's branch keeps its start."""
    model = build()[0]
    vit = plain(model)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    fresh = timm.create_model(NANO, checkpoint_path=str(tmp_path / "vit.safetensors"), sa_only=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(x), vit(x))
    overlay = {"file": str(tmp_path / "vit.safetensors")}
    fresh = timm.create_model(NANO, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, img_size=48).eval()
    assert fresh(torch.randn(1, 3, 48, 48)).shape == (1, 3)
    assert torch.equal(fresh.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    with pytest.raises(RuntimeError, match=r"glca\.q\.weight"):
        fresh.load_state_dict({k: v for k, v in fresh.state_dict().items() if k != "glca.q.weight"})


def test_without_classes():
    model, x = build(num_classes=0)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x)[:, :-1])
    model.reset_classifier(4, "token")
    assert model(x).shape == (3, 4)


def test_a_file_says_what_it_is(tmp_path):
    model, x = build(num_classes=7)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = visionattn.load(tmp_path / "weights.safetensors")
    assert loaded.pretrained_cfg["architecture"] == NANO
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_pool": "max"}, "must be one of 'token', 'avg'; got 'max'"),
        ({"local_ratio": 1.5}, "from 0 to 1; got 1.5"),
        ({"global_pool": "avg"}, "global_pool must be 'token', the class token; got 'avg'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        timm.create_model(NANO, **arguments)


def test_branches_need_both():
    model, x = build(sa_only=True)
    with pytest.raises(InputError, match="there is one branch"):
        model.forward_branches(x)
    with pytest.raises(InputError, match="got 'max'"):
        model.reset_classifier(3, "max")
