"""Windows against a loop in float64, against NATTEN and FlexAttention, and their cost."""

import pytest
import torch
from torch import Tensor

from tests.mixers.contract import peak_memory
from visionattn.errors import InputError
from visionattn.mixers import MIXERS
from visionattn.mixers.window import window_attention

# Grid, kernel, dilation, stride.
CASES = [
    ((9, 11), (3, 5), (1, 1), (1, 1)),
    ((9, 11), (4, 3), (2, 3), (1, 1)),
    ((12, 12), (4, 4), (1, 1), (4, 4)),
    ((13, 10), (5, 4), (1, 2), (3, 2)),
    ((14, 15), (6, 5), (2, 3), (2, 4)),
]


def positions(i: int, n: int, k: int, d: int, s: int, border: str) -> list[int | None]:
    """Positions of the keys of an axis, None for one outside the grid."""
    r, p = i % d, i // d
    members = -(-(n - r) // d)
    first = min(s * (p // s) + s // 2, members - 1) - k // 2
    if border == "inward":
        first = max(0, min(first, members - k))
    return [(first + t) * d + r if 0 <= first + t < members else None for t in range(k)]


def definition(q: Tensor, k: Tensor, v: Tensor, grid, kernel, dilation, stride, border: str, prefix: int) -> Tensor:
    """One query at a time."""
    out = torch.empty_like(q)
    k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2) for x in (k, v))
    for i in range(q.shape[2]):
        seen = list(range(q.shape[2])) if i < prefix else list(range(prefix))
        if i >= prefix:
            y, x = divmod(i - prefix, grid[1])
            for row in positions(y, grid[0], kernel[0], dilation[0], stride[0], border):
                for column in positions(x, grid[1], kernel[1], dilation[1], stride[1], border):
                    if row is not None and column is not None:
                        seen.append(prefix + row * grid[1] + column)
                    elif border == "zero":
                        seen.append(-1)
        weights = (q[:, :, i : i + 1] @ k[:, :, seen].transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        out[:, :, i] = (weights @ v[:, :, seen])[:, :, 0]
    return out


def draw(grid: tuple[int, int], prefix: int, dtype=torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, prefix + grid[0] * grid[1], 8, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("border", ["inward", "shrink", "zero"])
@pytest.mark.parametrize(("grid", "kernel", "dilation", "stride"), CASES)
def test_definition(grid, kernel, dilation, stride, border):
    q, k, v = draw(grid, prefix=2)
    found = window_attention(q, k, v, grid, kernel, dilation, stride, border)
    expected = definition(q, k, v, grid, kernel, dilation, stride, border, prefix=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("grid", "kernel", "dilation", "stride"), CASES)
def test_natten(grid, kernel, dilation, stride):
    natten = pytest.importorskip("natten", reason="natten is not installed")
    q, k, v = draw(grid, prefix=0, dtype=torch.float32)
    maps = [x.transpose(1, 2).unflatten(1, grid).contiguous() for x in (q, k, v)]
    expected = natten.na2d(*maps, kernel, stride=stride, dilation=dilation).flatten(1, 2).transpose(1, 2)
    found = window_attention(q, k, v, grid, kernel, dilation, stride)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_freeswim_windows_in_flex_attention():
    """The inward window as FreeSwim states it: half widths a, pushed inward by what is cut at a border."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (height, width), (a, b) = (9, 12), (2, 3)

    def near(i, j, n, half):
        low = i - half - (half + i - n + 1).clamp(min=0)
        high = i + half + (half - i).clamp(min=0)
        return (j >= low) & (j <= high)

    def seen(batch, head, query, key):
        rows = near(query // width, key // width, height, a)
        return rows & near(query % width, key % width, width, b)

    q, k, v = draw((height, width), prefix=0, dtype=torch.float32)
    mask = create_block_mask(seen, None, None, height * width, height * width, device="cpu")
    expected = flex_attention(q, k, v, block_mask=mask)
    found = window_attention(q, k, v, (height, width), (2 * a + 1, 2 * b + 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_blocked_attention_of_whole_windows():
    q, k, v = draw((8, 12), prefix=0)
    found = window_attention(q, k, v, (8, 12), (4, 4), stride=(4, 4))
    cut = [x.unflatten(2, (2, 4, 3, 4)).transpose(3, 4).flatten(4, 5) for x in (q, k, v)]
    blocks = torch.nn.functional.scaled_dot_product_attention(*cut)
    expected = blocks.unflatten(4, (4, 4)).transpose(3, 4).flatten(2, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_mask_of_keys():
    grid = (6, 7)
    q, k, v = draw(grid, prefix=1)
    mask = torch.rand(2, 43, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, 0] = True
    found = window_attention(q, k, v, grid, (3, 3), mask=mask)
    # The logits of invalid keys, as a constant channel of q and k, are so low that they have no weight.
    q = torch.cat([q, torch.ones_like(q)], dim=-1) * 2**0.5
    k = torch.cat([k, torch.where(mask[:, None, :, None], 0.0, -1e4).expand_as(k)], dim=-1)
    expected = window_attention(q, k, v, grid, (3, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_scale_of_larger_grids():
    mixer = MIXERS["window"](8, 2, kernel=9, trained_tokens=16, dtype=torch.float64)
    plain = MIXERS["window"](8, 2, kernel=9, dtype=torch.float64)
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 64, 8, dtype=torch.float64)
    assert not torch.allclose(mixer(x, (8, 8)), plain(x, (8, 8)))
    with torch.no_grad():  # log 64 / log 16 = 1.5
        plain.qkv.weight[:8] *= 1.5**0.5
        plain.qkv.bias[:8] *= 1.5**0.5
    torch.testing.assert_close(mixer(x, (8, 8)), plain(x, (8, 8)), rtol=0, atol=1e-12)


def test_memory_is_below_a_quarter_of_the_matrix():
    mixer = MIXERS["window"](96, 3, kernel=7).eval()
    matrix = 3 * 3136**2 * 4
    assert peak_memory(mixer, torch.randn(1, 3136, 96), (56, 56)) < matrix / 4


def test_bad_settings():
    with pytest.raises(InputError, match="border must be one of 'inward', 'shrink', 'zero'; got 'wrap'"):
        MIXERS["window"](8, 2, border="wrap")
    with pytest.raises(InputError, match=r"stride must be at most the kernel; got \(4, 4\) and \(3, 3\)"):
        MIXERS["window"](8, 2, kernel=3, stride=4)
    with pytest.raises(InputError, match="must be at least 1"):
        MIXERS["window"](8, 2, dilation=0)
