"""Fewer heads."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn
from visionattn.errors import InputError
from visionattn.frozen.heads import HEAD_SCORES, head_scores, prune_heads

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1])


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
    return timm.models.VisionTransformer(**{**settings, **options}).eval()


def minimal(name="va_minimal_vit_nano_patch4_32"):
    return timm.create_model(name, img_size=16, depth=2, embed_dim=16, num_heads=4, num_classes=5).eval()


def chosen(model, score, keep):
    """Heads that stay, by layer, from the scores alone."""
    scores = head_scores(model, IMAGES, score, LABELS)
    everything = [(float(v), n, h) for n, values in scores.items() for h, v in enumerate(values)]
    everything.sort(key=lambda entry: -entry[0])
    kept = {n: [max(range(len(values)), key=lambda h, v=values: float(v[h]))] for n, values in scores.items()}
    for _, name, head in everything:
        if sum(map(len, kept.values())) < round(keep * len(everything)) and head not in kept[name]:
            kept[name].append(head)
    return kept


@pytest.mark.parametrize("score", HEAD_SCORES)
@pytest.mark.parametrize("make", [vit, lambda: vit(qk_norm=True, norm_layer=torch.nn.LayerNorm), minimal])
@torch.no_grad()
def test_pruning_equals_zeros_in_the_projection(make, score):
    model = make()
    zeroed = copy.deepcopy(model)
    kept = chosen(model, score, 0.5)
    savings = prune_heads(model, IMAGES, 0.5, score, LABELS)
    for name, heads in kept.items():
        layer = zeroed.get_submodule(name)
        weight = layer.proj.weight.unflatten(1, (layer.num_heads, -1))
        weight[:, [h for h in range(layer.num_heads) if h not in heads]] = 0
        assert model.get_submodule(name).num_heads == len(heads)
    torch.testing.assert_close(model(IMAGES), zeroed(IMAGES), atol=1e-6, rtol=1e-5)
    assert savings.parameters_after < savings.parameters_before
    assert savings.macs_after < savings.macs_before


def test_a_head_of_a_timm_layer_is_as_large_as_reckoned():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    savings = prune_heads(model, torch.zeros(1, 3, 224, 224), 5 / 6, "random")
    assert savings.parameters_before - savings.parameters_after == 49344
    assert savings.macs_before - savings.macs_after == 4 * 197 * 192 * 64 + 2 * 197**2 * 64


@torch.no_grad()
def test_usage_counts_the_head_of_the_largest_output():
    model = vit()
    layer = model.blocks[1].attn
    layer.proj.weight[:, 6:12] *= 100
    usage = head_scores(model, IMAGES, "usage")["blocks.1.attn"]
    assert usage.tolist() == [0, 1, 0, 0]
    norms = head_scores(model, IMAGES, "norm")["blocks.1.attn"]
    assert norms.argmax() == 1


def test_the_gradient_is_that_of_a_gate():
    model = vit().double()
    got = head_scores(model, IMAGES, "gradient", LABELS)["blocks.2.attn"]

    def loss(gate):
        def scale(layer, inputs):
            return (torch.cat([inputs[0][..., :6] * gate, inputs[0][..., 6:]], dim=-1),)

        handle = model.blocks[2].attn.proj.register_forward_pre_hook(scale)
        with torch.no_grad():
            found = F.cross_entropy(model(IMAGES.double()), LABELS, reduction="none")
        handle.remove()
        return found

    wanted = ((loss(1.001) - loss(0.999)) / 0.002).abs().mean()
    torch.testing.assert_close(got[0], wanted.cpu(), atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_mixture_of_heads_is_pruned_by_its_own_counts():
    model = vit()
    visionattn.swap(model, "moh", shared_heads=1, routed_heads=1)
    mixer = model.blocks[0].attn.mixer
    mixer.wg.weight.zero_()
    mixer.wg.weight[2, 0] = 1.0
    tokens = []
    handle = model.blocks[0].attn.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    usage = head_scores(model, IMAGES, "usage")["blocks.0.attn"]
    handle.remove()
    positive = float((tokens[0][..., 0] > 0).double().mean())
    assert usage[0] == 1
    assert usage[3] == pytest.approx(positive)
    assert float(usage.sum()) == pytest.approx(2)
    prune_heads(model, IMAGES, 0.5, "usage")
    assert model(IMAGES).isfinite().all()
    for block in model.blocks:
        mixer = block.attn.mixer
        assert mixer.shared_heads == 1
        assert mixer.wg_1 is None
        assert block.attn.num_heads == 1 + (mixer.wg.weight.shape[0] if mixer.wg is not None else 0)


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (vit, {"keep": 0}, "above 0"),
        (vit, {"keep": 1.1}, "at most 1"),
        (vit, {"keep": 0.5, "score": "best"}, "must be one of 'usage'"),
        (vit, {"keep": 0.5, "score": "gradient"}, "a label for each of the 3 images; got none"),
        (vit, {"keep": 0.5, "score": "gradient", "labels": LABELS + 9}, "from 0 to 4"),
        (lambda: minimal("va_minimal_vit_nano_patch4_32_minimum"), {"keep": 0.5}, "cannot be pruned"),
        (lambda: timm.create_model("resnet18"), {"keep": 0.5}, "no timm Attention"),
    ],
)
def test_mistakes_are_named(make, arguments, words):
    with pytest.raises(InputError, match=words):
        prune_heads(make(), IMAGES, **arguments)


def test_images_are_needed():
    with pytest.raises(InputError, match="at least one image"):
        prune_heads(vit(), [], 0.5)


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS.tolist(), LABELS[:, None]])
def test_labels_are_integers_in_a_row(labels):
    with pytest.raises(InputError, match=r"must be an int64 tensor of shape \(3,\); got"):
        prune_heads(vit(), IMAGES, 0.5, "gradient", labels)


@pytest.mark.parametrize("score", ["usage", "norm", "gradient"])
def test_images_that_do_not_fit_and_nan_are_named(score):
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="does not run on images of 3 x 8 x 8"):
        prune_heads(model, IMAGES[..., :8, :8], 0.5, score, LABELS)
    with pytest.raises(InputError, match="does not run on images of 1 x 16 x 16"):
        prune_heads(model, IMAGES[:, :1], 0.5, score, LABELS)
    with pytest.raises(InputError, match=r"heads of blocks\.0\.attn cannot be scored: its outputs contain NaN"):
        prune_heads(model, IMAGES * torch.nan, 0.5, score, LABELS)
    with pytest.raises(InputError, match="at least one image"):
        prune_heads(model, None, 0.5, score, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
