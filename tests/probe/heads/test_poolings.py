"""Poolings of tokens: the table of parameters, and each against attention, blocks or loops that others wrote."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d
from torch import nn

from tests.blocks.contract import randomise
from visionattn.cost import count_parameters
from visionattn.errors import InputError, UnknownNameError
from visionattn.probe import POOLINGS, create_pooling

DIM, GRID = 48, (3, 5)
N = GRID[0] * GRID[1]
PLAIN = {"self_attention": False}
CASES = [(name, {}) for name in POOLINGS] + [("abmilp", PLAIN)]
case = pytest.mark.parametrize(("name", "options"), CASES, ids=["-".join([name, *options]) for name, options in CASES])
UNUSED = {"cae": ["norm2_cross.weight", "norm2_cross.bias"]}
CANCELS = {"score.0.bias", "score.2.bias"}  # a softmax does not see what all tokens share


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name, dtype=torch.float32, **options):
    """A pooling in evaluation mode whose parameters and statistics are no special values."""
    options = {"num_queries": 6, **options} if name in ("ep", "ep_all") else options
    pooling = randomise(create_pooling(name, DIM, GRID, dtype=dtype, **options)).eval()
    for buffer_name, buffer in pooling.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif buffer_name.endswith("running_mean"):
            buffer.normal_()
    return pooling


def tokens(batch=2, dtype=torch.float32):
    return torch.randn(batch, N, DIM, dtype=dtype)


@pytest.mark.parametrize(
    ("spec", "options", "counts"),
    [  # D = 384, 768 and 1024, a grid of 14 x 14, as counted on the authors' heads
        ("cls", {}, (0, 0, 0)),
        ("gap", {}, (0, 0, 0)),
        ("ep", {}, (159_744, 614_400, 1_081_344)),
        ("ep_8", {}, (150_528, 595_968, 1_056_768)),
        ("ep_all_16", {}, (153_600, 602_112, 1_064_960)),
        ("ep_64", {}, (172_032, 638_976, 1_114_112)),
        ("aim", {}, (295_296, 1_180_416, 2_098_176)),
        ("jepa", {}, (1_774_848, 7_088_640, 12_597_248)),
        ("cae", {}, (593_664, 2_366_976, 4_204_544)),
        ("cait", {}, (1_776_384, 7_091_712, 12_601_344)),
        ("coca", {}, (518_016, 1_036_032, 1_381_376)),
        ("siglip", {}, (1_773_312, 7_085_568, 12_593_152)),
        ("clip", {}, (667_776, 2_515_200, 4_402_176)),
        ("simpool", {}, (295_680, 1_181_184, 2_099_200)),
        ("esimpool", {}, (768, 1_536, 2_048)),
        ("cbam", {}, (18_532, 73_828, 131_172)),
        ("dolg", {}, (148_993, 592_897, 1_052_673)),
        ("dinovit", {}, (1_773_312, 7_085_568, 12_593_152)),
        ("abmilp", {}, (738_433, 2_951_425, 5_245_953)),
        ("abmilp", PLAIN, (385, 769, 1_025)),
    ],
)
def test_parameters(spec, options, counts):
    built = [create_pooling(spec, dim, (14, 14), device="meta", **options) for dim in (384, 768, 1024)]
    assert tuple(count_parameters(pooling) for pooling in built) == counts
    assert [pooling.out_dim for pooling in built] == [384, 768, 1024]


def test_narrow_efficient_probing():
    forms = [("ep_32", 384), ("ep_32", 192), ("ep_8", 96)]
    counts = [count_parameters(create_pooling(spec, 768, GRID, out_dim=width)) for spec, width in forms]
    assert counts == [319_488, 172_032, 79_872]
    assert create_pooling("ep_8", 768, GRID, out_dim=96)(torch.randn(1, 3, 768)).shape == (1, 96)


def test_default_tokens():
    by_tokens = {name: pooling.tokens for name, pooling in POOLINGS.items()}
    assert by_tokens.pop("cls") == "class"
    assert by_tokens.pop("ep_all") == "all"
    assert set(by_tokens.values()) == {"patches"}


@case
def test_every_batch_keeps_its_axis(name, options):
    pooling, x = make(name, **options), tokens(3)
    expected = pooling(x)
    assert expected.shape == (3, pooling.out_dim)
    torch.testing.assert_close(pooling(x[1:2]), expected[1:2])


@case
def test_any_number_of_tokens(name, options):
    pooling = make(name, **options)
    if hasattr(pooling, "grid"):
        with pytest.raises(InputError, match="16 tokens do not match the grid of 3 x 5"):
            pooling(torch.randn(2, 16, DIM))
    else:
        assert [pooling(torch.randn(2, size, DIM)).shape for size in (1, 16)] == [(2, DIM)] * 2


@case
@pytest.mark.parametrize("train", [True, False])
def test_gradients_in_float64(name, options, train):
    pooling = make(name, torch.float64, **options).train(train)
    names = [key for key, _ in pooling.named_parameters() if key not in UNUSED.get(name, [])]
    values = [pooling.get_parameter(key).detach().requires_grad_() for key in names]

    def function(x, *values):
        return torch.func.functional_call(pooling, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (tokens(2, torch.float64).requires_grad_(), *values), fast_mode=True)


@case
def test_every_used_parameter_gets_a_gradient(name, options):
    pooling = make(name, **options)
    pooling(tokens().requires_grad_()).square().sum().backward()
    silent = [key for key, p in pooling.named_parameters() if p.grad is None or not p.grad.any()]
    assert [key for key in silent if name != "abmilp" or key not in CANCELS] == UNUSED.get(name, [])


@case
def test_device_and_dtype_reach_every_tensor(name, options):
    pooling = create_pooling(name, 96, GRID, device="meta", dtype=torch.bfloat16, **options)
    assert {t.device.type for t in [*pooling.parameters(), *pooling.buffers()]} <= {"meta"}
    assert {p.dtype for p in pooling.parameters()} <= {torch.bfloat16}


@case
def test_export_keeps_the_batch_open(name, options):
    pooling = make(name, **options)
    axes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(pooling, (tokens(2),), dynamic_shapes=axes).module()
    for batch in (1, 3):
        x = tokens(batch)
        torch.testing.assert_close(program(x), pooling(x))


# Each pooling once more, from torch's or timm's modules or in loops. `p` is the pooling, `x` its tokens.


def norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return scaled * layer.weight + (0 if layer.bias is None else layer.bias)


def mlp(p, r):
    return p.fc2(F.gelu(p.fc1(r)))


def attention(heads, q_weight, k_weight, v_weight, proj=None, biases=None):
    """torch's own multi-head attention with these weights; its output map is the identity where there is none."""
    dim = v_weight.shape[0]
    mha = nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([q_weight, k_weight, v_weight]))
        mha.in_proj_bias.copy_(torch.zeros(3 * dim) if biases is None else biases)
        mha.out_proj.weight.copy_(torch.eye(dim) if proj is None else proj.weight)
        mha.out_proj.bias.copy_(torch.zeros(dim) if proj is None else proj.bias)
    return lambda q, k, v: mha(q.expand(len(k), -1, -1), k, v, need_weights=False)[0]


def softmax_loop(scores):
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def cls(p, x):
    return torch.stack([image[0] for image in x])


def gap(p, x):
    return sum(x.unbind(1)) / N


def ep(p, x):
    values = F.linear(x, p.value.weight).unflatten(-1, (p.num_queries, -1))  # every token, as the authors order it
    shares = torch.einsum("md,bnd->bmn", p.queries, x).div(DIM**0.5).softmax(-1)
    return torch.einsum("bmn,bnmo->bmo", shares, values).flatten(1)


def aim(p, x):
    mean, variance = p.bn.running_mean, p.bn.running_var
    if p.training:
        mean, variance = x.mean((0, 1)), x.var((0, 1), correction=0)
    z = (x - mean) / (variance + 1e-6).sqrt()
    return attention(16, torch.eye(DIM), p.k.weight, p.v.weight)(p.query, z, z)[:, 0]


def jepa(p, x):
    keys, values = p.kv.weight.chunk(2)
    z = norm(p.norm1, x)
    attend = attention(16, p.q.weight, keys, values, p.proj, torch.cat([p.q.bias, p.kv.bias]))
    r = p.query + attend(p.query, z, z)
    return (r + mlp(p.mlp, norm(p.norm2, r)))[:, 0]


def cae(p, x):
    attend = attention(8, p.q.weight, p.k.weight, p.v.weight, p.proj)
    return attend(norm(p.norm1_q, p.query), norm(p.norm1_k, x), norm(p.norm1_v, x))[:, 0]


def cait(p, x):
    inner, query = p.block.attn, p.query.expand(len(x), -1, -1)
    z = norm(p.block.norm1, torch.cat([query, x], dim=1))
    layers = (inner.q, inner.k, inner.v)
    attend = attention(4, *(layer.weight for layer in layers), inner.proj, torch.cat([layer.bias for layer in layers]))
    r = query + p.block.gamma_1 * attend(z[:, :1], z, z)
    r = r + p.block.gamma_2 * mlp(p.block.mlp, norm(p.block.norm2, r))
    return norm(p.norm, r)[:, 0]


def coca(p, x):
    """All queries attend; the first is read."""
    q = F.linear(norm(p.norm, p.queries), p.q.weight).unflatten(1, (8, 64))
    k, v = F.linear(x, p.kv.weight[:64]), F.linear(x, p.kv.weight[64:])
    shares = torch.einsum("qhd,bnd->bqhn", q, k).div(8).softmax(-1)
    pooled = torch.einsum("bqhn,bnd->bqhd", shares, v).flatten(2)
    return F.linear(pooled, p.proj.weight)[:, 0]


def siglip(p, x):
    pool = p.pool
    keys, values = pool.kv.weight.chunk(2)
    biases = torch.cat([pool.q.bias, pool.kv.bias])
    r = attention(8, pool.q.weight, keys, values, pool.proj, biases)(pool.latent, x, x)
    return (r + mlp(pool.mlp, r))[:, 0]


def clip(p, x):
    """timm's pool, where every row attends and the first is read."""
    pool = AttentionPool2d(DIM, feat_size=GRID, num_heads=4, dtype=torch.float64)
    pool.load_state_dict({key: value for key, value in p.state_dict().items() if not key.startswith("norm.")})
    return pool(norm(p.norm, x).transpose(1, 2).unflatten(2, GRID))


def simpool(p, x):
    out = torch.empty(len(x), DIM, dtype=x.dtype)
    for b, image in enumerate(x):
        q = p.q.weight @ image.mean(0)
        z = norm(p.norm, image)
        shares = softmax_loop([float(q @ (p.k.weight @ token)) / DIM**0.5 for token in z])
        out[b] = sum(share * token for share, token in zip(shares, z))
    return out


def esimpool(p, x):
    out, width = torch.empty(len(x), DIM, dtype=x.dtype), DIM // 12
    for (b, image), head in itertools.product(enumerate(x), range(12)):
        own = slice(head * width, (head + 1) * width)
        q = norm(p.norm, image.mean(0))[own]
        shares = softmax_loop([float(q @ norm(p.norm, token)[own]) / width**0.5 for token in image])
        out[b, own] = sum(share * token[own] for share, token in zip(shares, image))
    return out


def cbam(p, x):
    """Place by place on the grid, outside of which there are zeros; `bn` normalises the one map over the batch."""
    gates = p.gates
    first, second = gates.channel.fc1.weight.flatten(1), gates.channel.fc2.weight.flatten(1)
    channel = torch.zeros(len(x), DIM, dtype=x.dtype)
    for b, image in enumerate(x):
        squeezed = [second @ (first @ summary).relu() for summary in (image.mean(0), image.amax(0))]
        channel[b] = sum(squeezed).sigmoid()
    gated = x * channel[:, None]
    kernel, bn = gates.spatial.conv.conv.weight[0], gates.spatial.conv.bn
    place = torch.zeros(len(x), *GRID, dtype=x.dtype)
    for b, i, j in itertools.product(range(len(x)), range(GRID[0]), range(GRID[1])):
        for u, v in itertools.product(range(-3, 4), range(-3, 4)):
            if 0 <= i + u < GRID[0] and 0 <= j + v < GRID[1]:
                token = gated[b, (i + u) * GRID[1] + j + v]
                place[b, i, j] += kernel[:, u + 3, v + 3] @ torch.stack([token.mean(), token.max()])
    mean, variance = bn.running_mean, bn.running_var
    if p.training:
        mean, variance = place.mean(), place.var(correction=0)
    place = ((place - mean) / (variance + 1e-5).sqrt() * bn.weight + bn.bias).sigmoid()
    return (x + gated * place.flatten(1)[:, :, None]).relu().mean(1)


def dolg(p, x):
    z = x @ p.project.weight.T + p.project.bias
    mean, variance = p.bn.running_mean, p.bn.running_var
    if p.training:
        mean, variance = z.mean((0, 1)), z.var((0, 1), correction=0)
    z = (z - mean) / (variance + 1e-5).sqrt() * p.bn.weight + p.bn.bias
    out = torch.zeros(len(x), DIM, dtype=x.dtype)
    for b, n in itertools.product(range(len(x)), range(N)):
        score = float(p.score.weight[0] @ z[b, n].relu() + p.score.bias)
        out[b] += math.log1p(math.exp(score)) * z[b, n] / z[b, n].norm() / N
    return out


def dinovit(p, x):
    """torch's own pre-norm encoder layer."""
    layer = nn.TransformerEncoderLayer(
        DIM, 8, 4 * DIM, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    names = {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.proj": "self_attn.out_proj"}
    weights = {"self_attn.in_proj_bias": torch.zeros(3 * DIM)}
    for key, value in p.block.state_dict().items():
        for ours, theirs in {**names, "mlp.fc1": "linear1", "mlp.fc2": "linear2"}.items():
            key = key.replace(ours, theirs)
        weights[key] = value
    layer.load_state_dict(weights)
    return layer(x).mean(1)


def abmilp(p, x):
    z = x
    if p.qkv is not None:
        z = attention(1, *p.qkv.weight.chunk(3), p.proj)(x, x, x)
    out = torch.zeros(len(x), DIM, dtype=x.dtype)
    for b, image in enumerate(z):
        hidden = image if p.qkv is None else torch.tanh(image @ p.score[0].weight.T + p.score[0].bias)
        shares = softmax_loop((hidden @ p.score[-1].weight[0] + p.score[-1].bias).tolist())
        out[b] = sum(share * token for share, token in zip(shares, image))
    return out


DEFINITIONS = {name: globals()["ep" if name == "ep_all" else name] for name in POOLINGS}


@case
@pytest.mark.parametrize("train", [True, False])
def test_equals_an_independent_form(name, options, train):
    pooling, x = make(name, torch.float64, **options).train(train), tokens(2, torch.float64)
    with torch.no_grad():
        expected = DEFINITIONS[name](pooling, x)
        torch.testing.assert_close(pooling(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dim", "heads"), [(384, 12), (768, 12), (1024, 8)])
def test_heads_of_linear_free_simpool_divide(dim, heads):
    assert create_pooling("esimpool", dim, GRID).num_heads == heads


def test_starting_values():
    pooling = create_pooling("jepa", 256, GRID)
    assert pooling.query.std().item() == pytest.approx(0.02, rel=0.2)
    assert pooling.kv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert pooling.proj.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)
    assert not pooling.kv.bias.any()
    assert create_pooling("aim", 1024, GRID).query.std().item() == pytest.approx(0.02, rel=0.1)
    assert create_pooling("clip", 256, GRID).pos_embed.std().item() == pytest.approx(1 / 16, rel=0.1)
    assert create_pooling("dolg", 512, GRID).project.weight.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_short_names():
    assert create_pooling("ep_16", DIM, GRID).num_queries == 16
    every = create_pooling("ep_all_3", DIM, GRID, out_dim=12)
    assert (every.num_queries, every.tokens, every.out_dim) == (3, "all", 12)


@pytest.mark.parametrize("spec", ["attention", "EP", "jepa_4", "ep_0", "ep_x", ""])
def test_unknown_names_say_what_is_known(spec):
    with pytest.raises(UnknownNameError, match=f"no pooling {spec!r}; use one of cls, gap, ep, ep_all, aim, .*ep_M"):
        create_pooling(spec, DIM, GRID)


def test_heads_that_do_not_divide():
    for name, pooling in POOLINGS.items():
        if "num_heads" in inspect.signature(pooling).parameters and name != "coca":
            with pytest.raises(InputError, match=r"dim \(48\) must be divisible by num_heads \(5\)"):
                create_pooling(name, DIM, GRID, num_heads=5)
    with pytest.raises(InputError, match="num_queries 5"):
        create_pooling("ep_5", DIM, GRID)
