"""Halo attention: the operator contract, timm's layer, a dense formula, and what blocks and windows imply."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.kernels.contract import OperatorContract
from tests.kernels.tensors import differentiate
from visionattn.errors import InputError
from visionattn.kernels._plain import halo_attention as plain
from visionattn.kernels.halo_attention import BORDERS, INDICES, halo_attention_definition

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
operator = torch.ops.visionattn.halo_attention


class Attend(nn.Module):
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        height_rel: Tensor,
        width_rel: Tensor,
        block_size: int,
        halo_size: int,
        stride: int,
        border: str,
        index: str,
    ) -> Tensor:
        return torch.ops.visionattn.halo_attention(
            q, k, v, height_rel, width_rel, block_size, halo_size, stride, border, index
        )


def arguments(
    images=2,
    heads=2,
    dim=4,
    dim_v=None,
    size=(8, 8),
    block=4,
    halo=1,
    stride=1,
    border="mask",
    index="offset",
    dtype=torch.float64,
    device="cpu",
    seed=0,
):
    """Random arguments of the operator."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    H, W = size
    q = draw(images, heads, dim, math.ceil(H / stride), math.ceil(W / stride))
    k, v = draw(images, heads, dim, H, W), draw(images, heads, dim_v or dim, H, W)
    tables = (draw(2 * (block + 2 * halo) - 1, dim) for _ in "hw")
    return (q, k, v, *tables, block, halo, stride, border, index)


def channels_last(x):
    """A map (B, heads, D, H, W) whose D is the densest axis, as a channels-last convolution gives it."""
    return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)


class TestHaloAttention(OperatorContract):
    name = "halo_attention"
    definition = staticmethod(halo_attention_definition)
    module = Attend
    tolerance = TOLERANCE

    def samples(self, dtype, device):
        def case(**options):
            return arguments(dtype=dtype, device=device, **options)

        q, k, v, *rest = case(size=(8, 12))
        both = torch.cat([k, v], dim=2)
        return [
            case(size=(9, 7), dim_v=6),
            case(images=3, heads=4, size=(14, 5), dim_v=3),
            (q, *both.split(4, dim=2), *rest),
            (*map(channels_last, (q, k, v)), *rest),
            (*map(channels_last, case(size=(7, 9))[:3]), *rest),
            case(border="zero", index="timm", size=(8, 12)),
            case(border="zero", size=(5, 6)),
            case(stride=2, size=(8, 11), dim_v=8),
            case(stride=2, index="timm", border="zero", size=(6, 8), block=2),
            case(block=2, halo=3, size=(5, 4)),  # a window of four blocks
            case(halo=0, size=(6, 4)),
            case(block=1, halo=1, size=(3, 4)),
            case(block=8, halo=2, size=(3, 5)),  # a window larger than the map
            case(dim=2, dim_v=1, heads=1, images=1, size=(1, 1)),
        ]

    def interpreter_samples(self, dtype):
        # The time is that of the programs, one for each block of each head of each image.
        def case(**options):
            return arguments(**{"images": 1, "heads": 1, "dtype": dtype} | options)

        return [
            case(size=(5, 7), dim_v=6),
            case(border="zero", index="timm", size=(3, 9)),
            case(stride=2, size=(4, 11), dim_v=8),
            case(images=2, heads=2, size=(3, 4), dim_v=6),
            case(border="zero", size=(5, 6)),
            case(stride=2, index="timm", border="zero", size=(4, 6), block=2),
            case(block=2, halo=3, size=(5, 4)),  # a window of four blocks
            case(block=1, halo=1, size=(3, 3)),
            case(dim=2, dim_v=1, size=(1, 1)),
            case(block=8, halo=3, size=(9, 8), dim=6),  # more queries, rows and keys than a tile holds
            case(block=6, halo=1, size=(7, 9), stride=2),  # rows of queries numbered by 4, of keys by 8
            case(block=5, halo=2, size=(8, 6)),  # by 5
        ]


def test_several_chunks_are_as_one(monkeypatch):
    args = arguments(images=3, size=(18, 21), dim_v=3)
    whole = differentiate(operator, args)
    for wanted in (1, 2000, 9000, 40000):  # a block at a time; some columns; some rows; some images
        monkeypatch.setattr(plain, "_CHUNK_ON_CPU", wanted)
        torch.testing.assert_close(differentiate(operator, args), whole)


def dense(q, k, v, height_rel, width_rel, block, halo, stride, border, index):
    """The formula over all pairs of a query and a pixel of the padded plane, one query after the other."""
    (B, heads, D, H, W), window = k.shape, block + 2 * halo
    out = torch.zeros(B, heads, v.shape[2], *q.shape[3:], dtype=q.dtype)
    for y in range(q.shape[3]):
        for x in range(q.shape[4]):
            logits, values = [], []
            for row in range(window):
                for column in range(window):
                    top, left = y * stride // block * block - halo, x * stride // block * block - halo
                    inside = 0 <= top + row < H and 0 <= left + column < W
                    if not inside and border == "mask":
                        continue
                    key = k[..., top + row, left + column] if inside else torch.zeros_like(k[..., 0, 0])
                    value = v[..., top + row, left + column] if inside else torch.zeros_like(v[..., 0, 0])
                    if index == "offset":  # distance in pixels between the key and the query
                        dy, dx = top + halo + row - y * stride, left + halo + column - x * stride
                    else:
                        dy, dx = row - y % (block // stride), column - x % (block // stride)
                    query = q[..., y, x]
                    position = height_rel[window - 1 + dy] + width_rel[window - 1 + dx]
                    logits.append((query * key).sum(-1) / D**0.5 + query @ position)
                    values.append(value)
            shares = torch.stack(logits, -1).softmax(-1)
            out[..., y, x] = torch.einsum("bhn,bhdn->bhd", shares, torch.stack(values, -1))
    return out


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(
    "form",
    [
        {"size": (7, 6), "block": 3, "halo": 2},
        {"size": (8, 9), "block": 4, "halo": 1, "stride": 2, "dim_v": 3},
        {"size": (5, 3), "block": 2, "halo": 0},
    ],
    ids=str,
)
def test_equals_the_dense_formula(form, border, index):
    args = arguments(images=1, border=border, index=index, **form)
    expected = differentiate(dense, args)
    torch.testing.assert_close(differentiate(operator, args), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(differentiate(halo_attention_definition, args), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    block=st.integers(1, 5),
    halo=st.integers(0, 4),
    subsample=st.integers(1, 2),
    border=st.sampled_from(BORDERS),
    index=st.sampled_from(INDICES),
    seed=st.integers(0, 99),
)
def test_any_size_block_and_halo(size, block, halo, subsample, border, index, seed):
    args = arguments(
        images=1, size=size, block=block * subsample, halo=halo, stride=subsample, border=border, index=index, seed=seed
    )
    found, expected = differentiate(operator, args), differentiate(halo_attention_definition, args)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(block=st.integers(1, 4), halo=st.integers(0, 4), down=st.integers(-1, 1), right=st.integers(-1, 1))
def test_moving_the_input_by_blocks_moves_the_output(block, halo, down, right):
    blocks = 3 + 2 * math.ceil(halo / block)  # a block in the middle whose window, moved or not, is inside
    q, k, v, *rest = arguments(images=1, size=(blocks * block, blocks * block), block=block, halo=halo)
    shift = (down * block, right * block)
    out = operator(q, k, v, *rest)
    moved = operator(*(x.roll(shift, dims=(3, 4)) for x in (q, k, v)), *rest)
    middle = slice(blocks // 2 * block, (blocks // 2 + 1) * block)
    torch.testing.assert_close(
        moved.roll((-shift[0], -shift[1]), dims=(3, 4))[..., middle, middle], out[..., middle, middle]
    )


def test_a_block_as_large_as_the_map_attends_globally():
    q, k, v, *_ = args = arguments(size=(6, 6), block=6, halo=0)
    zeros = [torch.zeros_like(table) for table in args[3:5]]
    found = operator(q, k, v, *zeros, *args[5:])
    tokens = (x.flatten(3).transpose(2, 3) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*tokens).transpose(2, 3).view(found.shape)
    torch.testing.assert_close(found, expected)


def test_shares_at_the_border():
    """Masked, they go to real pixels alone, and a map of ones stays one; keys of zeros outside take a part of them."""
    q, k, v, *rest = arguments(size=(6, 5), halo=2)
    ones = torch.ones_like(v)
    torch.testing.assert_close(operator(q, k, ones, *rest), ones)
    assert (operator(q, k, ones, *rest[:-2], "zero", "offset") < 1).all()


@pytest.mark.parametrize(("stride", "index", "unread"), [(1, "offset", 6), (1, "timm", 6), (2, "timm", 10)])
def test_rows_that_no_pair_reads_get_no_gradient(stride, index, unread):
    args = arguments(size=(16, 16), block=8, halo=3, stride=stride, index=index, border="zero")
    *_, height, width = differentiate(operator, args)[1]
    for gradient in (height, width):
        assert not gradient[:unread].any()
        assert gradient[unread:].abs().amin() > 0


@pytest.mark.parametrize("dim", [4, 12, 24, 36, 108, 128])
@pytest.mark.parametrize("block", [7, 8, 10, 12, 14])
def test_head_widths_and_blocks_of_published_models(dim, block):
    args = arguments(images=1, heads=1, dim=dim, size=(block + 3, block), block=block, halo=2, dtype=torch.float32)
    doubles = [x.double() if isinstance(x, Tensor) else x for x in args]
    for found, expected in zip(differentiate(operator, args), differentiate(halo_attention_definition, doubles)):
        for ours, exact in zip(found, expected):
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * max(1, exact.abs().max().item()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 4, "stride": 3}, "block_size 4, stride 3"),
        ({"halo_size": -1}, "halo_size -1"),
        ({"block_size": 0}, "block_size 0"),
        ({"border": "wrap"}, "'mask', 'zero'"),
        ({"index": "paper"}, "'offset', 'timm'"),
        ({"height_rel": torch.zeros(10, 4)}, r"\(11, 4\), 2 \* \(4 \+ 2 \* 1\) - 1 rows"),
        ({"width_rel": torch.zeros(11, 5)}, r"width_rel: \(11, 5\)"),
        ({"q": torch.zeros(2, 2, 4, 8, 7)}, r"q: \(2, 2, 4, 8, 7\)"),
        ({"q": torch.zeros(2, 8, 8, 8)}, r"q: \(2, 8, 8, 8\)"),
        ({"v": torch.zeros(2, 2, 4, 8, 9)}, r"v: \(2, 2, 4, 8, 9\)"),
        ({"k": torch.zeros(2, 2, 4, 8, 8, dtype=torch.bfloat16)}, "k: torch.bfloat16"),
        ({"width_rel": torch.zeros(11, 4, dtype=torch.float64)}, "width_rel: torch.float64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_what_was_given(change, message):
    names = ("q", "k", "v", "height_rel", "width_rel", "block_size", "halo_size", "stride", "border", "index")
    with pytest.raises(InputError, match=message):
        operator(*(dict(zip(names, arguments(dtype=torch.float32))) | change).values())


@pytest.mark.parametrize("function", [operator, halo_attention_definition])
def test_no_images(function):
    outputs, gradients = differentiate(function, arguments(images=0))
    assert outputs[0].shape == (0, 2, 4, 8, 8)
    assert not any(gradient.any() for gradient in gradients)
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, 2, 4, 8, 8)] * 3 + [(11, 4)] * 2


@pytest.mark.parametrize("change", [{"heads": 0}, {"dim": 0}, {"size": (0, 8)}, {"size": (8, 0)}])
def test_nothing_to_attend_to_is_refused(change):
    with pytest.raises(InputError, match=r"at least one head, channel and pixel; got q: \(2, "):
        operator(*arguments(**change))
