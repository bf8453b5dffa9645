r"""Window attention: every query sees k_y x k_x keys of its neighbourhood.

One rule covers neighbourhood attention with dilation and stride, blocked attention and blocks with a halo. Along an
axis of n positions, with kernel k, dilation d and stride s, a query at position i sees keys of its residue class
r = i mod d, which has n_r = ceil((n - r) / d) members; it is member p = floor(i / d):

    leader    p' = min(s floor(p / s) + floor(s / 2), n_r - 1)         s queries share their leader's window
    first key a  = p' - floor(k / 2)
    border    inward   a <- clamp(a, 0, n_r - k)                       the window is moved into the grid
              shrink   keys outside the grid are ignored
              zero     keys and values outside are zeros, and are part of the softmax
    keys      { (a + t) d + r : t = 0 .. k - 1 }

The window is the product of both axes, and y_i is softmax attention to its keys and to all prefix tokens. Prefix tokens
as queries see all keys.

    k odd, s = 1                neighbourhood attention; with `inward` the window of FreeSwim
    s = k, n divisible by k     blocked attention (Swin without shift)
    k = s + 2 h, `zero`         halo attention with blocks of s and a halo of h

Sources: GNA, arXiv 2504.16922 and NATTEN, arXiv 2204.07143 (inward border, dilation, stride); FreeSwim, arXiv
2511.14712 (windows as large as the trained grid, and the scale below); HaloNet, arXiv 2103.12731 (zero border).

Deviations, and why. A kernel longer than the axis covers the whole axis, so that any grid is accepted. FreeSwim
multiplies the logits by sqrt(log_L0 L) with constants L0 and L; here L is the number of tokens and L0 is
`trained_tokens`.

Cost: 2 N k_y k_x C multiply-accumulates. Queries are computed in tiles that share a rectangle of keys, so that no
N x N matrix is built.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, pair, softmax_attention

__all__ = ["WindowMixer", "window_attention"]

BORDERS = ("inward", "shrink", "zero")


def axis_tables(
    n: int, kernel: int, dilation: int, stride: int, border: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys that the queries along an axis see, as T tiles of t queries that share L keys.

    Returns:
        Positions of the queries (T, t) and of the keys (T, L); whether a key is inside the grid (T, L) and whether a
        query sees it (T, t, L), bool; and the index of each position among the T t queries, (n,).
    """
    tile = stride * ((7 + stride) // stride)  # 8 queries or slightly more: their keys span little more than one window
    tiles = ((n + dilation - 1) // dilation + tile - 1) // tile
    residue = torch.arange(dilation, device=device)[:, None, None]  # (d, 1, 1)
    members = (n - residue + dilation - 1) // dilation
    p = torch.arange(tiles, device=device)[:, None] * tile + torch.arange(tile, device=device)
    p = torch.minimum(p[None], (members - 1).clamp(min=0))  # (d, tiles, t); past the end the last member repeats
    first = torch.minimum(p // stride * stride + stride // 2, members - 1) - kernel // 2
    if border == "inward":
        first = torch.minimum(first, members - kernel).clamp(min=0)
    keys = first[..., :1] + torch.arange(tile - stride + kernel, device=device)  # (d, tiles, L)
    seen = (keys[:, :, None] >= first[..., None]) & (keys[:, :, None] < first[..., None] + kernel)
    inside = (keys >= 0) & (keys < members)
    keys = (keys * dilation + residue).clamp(min=0, max=n - 1)
    queries = (p * dilation + residue).clamp(max=n - 1)
    i = torch.arange(n, device=device)
    index = (i % dilation * tiles + i // dilation // tile) * tile + i // dilation % tile
    return queries.flatten(0, 1), keys.flatten(0, 1), inside.flatten(0, 1), seen.flatten(0, 1), index


def by_pairs(x: Tensor) -> Tensor:
    """Flatten a table over pairs of tiles: (Ty, Tx, a, b) -> (Ty Tx, a b)."""
    return x.flatten(2, 3).flatten(0, 1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Select tokens by a table of indices: (B, N, ...), (T, K) -> (B, T, K, ...)."""
    return x.index_select(1, index.flatten()).unflatten(1, (index.shape[0], index.shape[1]))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    kernel: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    border: str = "inward",
    mask: Maybe = None,
) -> Tensor:
    """Attention to windows of a grid (equations: see the module).

    Args:
        q: Queries (B, heads, P + H W, D), prefix tokens first.
        k: Keys, as q.
        v: Values, as q.
        grid: (H, W).
        kernel: Window size in keys, (k_y, k_x).
        dilation: Distance between neighbouring keys of a window, per axis.
        stride: Number of neighbouring queries that share a window, per axis.
        border: `"inward"`, `"shrink"` or `"zero"`.
        mask: Valid keys (B, P + H W) bool.

    Returns:
        As q.
    """
    height, width = grid
    prefix = q.shape[2] - height * width
    row_q, row_k, row_in, row_seen, row_i = axis_tables(height, kernel[0], dilation[0], stride[0], border, q.device)
    col_q, col_k, col_in, col_seen, col_i = axis_tables(width, kernel[1], dilation[1], stride[1], border, q.device)
    queries = prefix + by_pairs(row_q[:, None, :, None] * width + col_q[None, :, None, :])  # (T, t t')
    keys = prefix + by_pairs(row_k[:, None, :, None] * width + col_k[None, :, None, :])  # (T, L L')
    inside = by_pairs(row_in[:, None, :, None] & col_in[None, :, None, :])
    seen = row_seen[:, None, :, None, :, None] & col_seen[None, :, None, :, None, :]  # (Ty, Tx, t, t', L, L')
    seen = by_pairs(seen.flatten(4, 5))  # (T, t t', L L')
    if border == "zero":
        keys = torch.where(inside, keys, q.shape[2])  # the index of a token of zeros after all others
    else:
        seen = seen & inside[:, None]
    first = torch.arange(prefix, device=q.device).expand(keys.shape[0], prefix)
    keys, seen = torch.cat([first, keys], dim=1), F.pad(seen, (prefix, 0), value=True)[None]
    if mask is not None:
        valid = gather(F.pad(mask, (0, 1), value=True), keys)[:, :, None]  # (B, T, 1, P + L L')
        seen = (seen & valid).repeat_interleave(q.shape[1], dim=0)

    around_k, around_v = k.flatten(0, 1), v.flatten(0, 1)  # (B heads, N, D)
    if border == "zero":
        around_k, around_v = F.pad(around_k, (0, 0, 0, 1)), F.pad(around_v, (0, 0, 0, 1))
    tiles = gather(q.flatten(0, 1), queries)  # (B heads, T, t t', D)
    tiles = F.scaled_dot_product_attention(tiles, gather(around_k, keys), gather(around_v, keys), attn_mask=seen)
    # Position (y, x) is query a of tile y' and query b of tile x'.
    t, t_x = row_q.shape[1], col_q.shape[1]
    tile = row_i[:, None] // t * col_q.shape[0] + col_i // t_x
    index = (tile * t + row_i[:, None] % t) * t_x + col_i % t_x  # (H, W)
    out = tiles.flatten(1, 2).index_select(1, index.flatten()).unflatten(0, (q.shape[0], q.shape[1]))
    return torch.cat([softmax_attention(q[:, :, :prefix], k, v, mask), out], dim=2)


class WindowMixer(Mixer):
    """Attention of each query to a window around it (equations: see the module; other arguments: see `Mixer`).

    Args:
        kernel: Window size in keys, one number or (k_y, k_x).
        dilation: Distance between neighbouring keys of a window, one number or per axis.
        stride: Number of neighbouring queries that share a window, one number or per axis; at most the kernel.
        border: `"inward"`, `"shrink"` or `"zero"`.
        trained_tokens: Number of tokens L0 that a model was trained on: logits at L tokens are multiplied by
            sqrt(log L / log L0); None: no scaling.

    Raises:
        InputError: `border` is unknown, a size is below 1, `stride` exceeds `kernel`, or `trained_tokens` is below 2.
    """

    supports = frozenset({"prefix", "mask", "any_grid", "script", "onnx"})
    limit = "a kernel as large as the grid, with the inward border and dilation 1"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        kernel: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        border: str = "inward",
        trained_tokens: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        if border not in BORDERS:
            raise InputError(f"border must be one of {', '.join(map(repr, BORDERS))}; got {border!r}.")
        self.kernel, self.dilation, self.stride = pair(kernel), pair(dilation), pair(stride)
        if min(*self.kernel, *self.dilation, *self.stride) < 1 or (trained_tokens or 2) < 2:
            raise InputError("kernel, dilation and stride must be at least 1, and trained_tokens at least 2.")
        if self.stride[0] > self.kernel[0] or self.stride[1] > self.kernel[1]:
            raise InputError(f"stride must be at most the kernel; got {self.stride} and {self.kernel}.")
        self.border = border
        self.log_trained = math.log(trained_tokens) if trained_tokens else 0.0

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend to windows."""
        if self.log_trained > 0:
            tokens = torch.full((1,), q.shape[2], dtype=q.dtype, device=q.device)
            q = q * (tokens.log() / self.log_trained).sqrt()
        return window_attention(q, k, v, grid, self.kernel, self.dilation, self.stride, self.border, mask)

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Attention to the keys of one window per query."""
        return 2 * n * min(self.kernel[0] * self.kernel[1], m) * self.dim
