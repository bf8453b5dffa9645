r"""Windows: every query sees k_y x k_x keys of its neighbourhood.

One rule serves neighbourhood attention with dilation and stride, blocked attention and blocks with a halo. Along an
axis of n positions, with kernel k, dilation d and stride s, a query at position i sees keys of its residue class
r = i mod d, which has n_r = ceil((n - r) / d) members; it is member p = floor(i / d):

    leader    p' = min(s floor(p / s) + floor(s / 2), n_r - 1)         s queries share their leader's window
    first key a  = p' - floor(k / 2)
    border    inward   a <- clamp(a, 0, n_r - k)                       the window is pushed into the grid
              shrink   keys outside the grid take no part
              zero     keys and values outside are zeros, which take part in the softmax
    keys      { (a + t) d + r : t = 0 .. k - 1 }

Both axes together give the window, and y_i is softmax attention to its keys and to all prefix tokens. Prefix tokens as
queries see everything.

    k odd, s = 1                neighbourhood attention; with `inward` the window of FreeSwim
    s = k, k divides n          blocked attention (Swin without shift)
    k = s + 2 h, `zero`         halo attention with blocks of s and a halo of h

Sources: GNA, arXiv 2504.16922 and NATTEN, arXiv 2204.07143 (inward border, dilation, stride); FreeSwim, arXiv
2511.14712 (windows as large as the trained grid, and the scale below); HaloNet, arXiv 2103.12731 (zero border).

Deviations, and why. A kernel that is longer than the axis sees the whole axis, so that any grid is taken. FreeSwim
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which keys the queries of an axis see, by tiles of t queries that share L keys.

    Returns:
        Positions of the queries (T, t) and keys (T, L) of T tiles, n standing for a key outside; which keys a query
        sees (T, t, L) bool; and the index of each position among the T t queries, (n,).
    """
    tile = stride * max(1, (3 * kernel + 2 * stride) // (5 * stride))  # about 0.6 kernels: few wasted products
    tiles = ((n + dilation - 1) // dilation + tile - 1) // tile
    residue = torch.arange(dilation, device=device)[:, None, None]  # (d, 1, 1)
    members = (n - residue + dilation - 1) // dilation
    p = torch.arange(tiles, device=device)[:, None] * tile + torch.arange(tile, device=device)
    p = torch.minimum(p[None], (members - 1).clamp(min=0))  # (d, tiles, t); beyond the end the last one again
    first = torch.minimum(p // stride * stride + stride // 2, members - 1) - kernel // 2
    if border == "inward":
        first = torch.minimum(first, members - kernel).clamp(min=0)
    keys = first[..., :1] + torch.arange(tile - stride + kernel, device=device)  # (d, tiles, L)
    seen = (keys[:, :, None] >= first[..., None]) & (keys[:, :, None] < first[..., None] + kernel)
    inside = (keys >= 0) & (keys < members)
    if border != "zero":
        seen = seen & inside[:, :, None]
    keys = torch.where(inside, keys * dilation + residue, n)
    queries = (p * dilation + residue).clamp(max=n - 1)
    i = torch.arange(n, device=device)
    index = (i % dilation * tiles + i // dilation // tile) * tile + i // dilation % tile
    return queries.flatten(0, 1), keys.flatten(0, 1), seen.flatten(0, 1), index


def rectangles(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cut rectangles of cells: (B, H, W, D), (Ty, a), (Tx, b) -> (B, Ty Tx, a b, D)."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = x.unflatten(2, (columns.shape[0], columns.shape[1])).unflatten(1, (rows.shape[0], rows.shape[1]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


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
        kernel: Keys of a window along rows and columns, (k_y, k_x).
        dilation: Steps between them.
        stride: Queries along an axis that share a window.
        border: `"inward"`, `"shrink"` or `"zero"`.
        mask: Valid keys (B, P + H W) bool.

    Returns:
        As q.
    """
    height, width = grid
    prefix = q.shape[2] - height * width
    row_q, row_k, row_seen, row_index = axis_tables(height, kernel[0], dilation[0], stride[0], border, q.device)
    col_q, col_k, col_seen, col_index = axis_tables(width, kernel[1], dilation[1], stride[1], border, q.device)
    seen = row_seen[:, None, :, None, :, None] & col_seen[None, :, None, :, None, :]  # (Ty, Tx, t, t', L, L')
    seen = seen.flatten(4, 5).flatten(2, 3).flatten(0, 1)[None]  # (1, T, t t', L L')
    if mask is not None:
        cells = mask[:, prefix:].unflatten(1, (height, width))[..., None]
        cells = F.pad(cells, (0, 0, 0, 1, 0, 1), value=border == "zero")
        valid = rectangles(cells, row_k, col_k).transpose(2, 3)  # (B, T, 1, L L')
        seen = (seen & valid).repeat_interleave(q.shape[1], dim=0)
        to_prefix = mask[:, None, None, :prefix].repeat_interleave(q.shape[1], dim=0)
        seen = torch.cat([to_prefix.expand(-1, seen.shape[1], seen.shape[2], -1), seen], dim=-1)
    else:
        seen = F.pad(seen, (prefix, 0), value=True)

    heads_q, heads_k, heads_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B heads, N, D)
    tiles = rectangles(heads_q[:, prefix:].unflatten(1, (height, width)), row_q, col_q)
    around: list[Tensor] = []
    for x in (heads_k, heads_v):
        cells = F.pad(x[:, prefix:].unflatten(1, (height, width)), (0, 0, 0, 1, 0, 1))
        near = rectangles(cells, row_k, col_k)  # (B heads, T, L L', D)
        around.append(torch.cat([x[:, None, :prefix].expand(-1, near.shape[1], -1, -1), near], dim=2))
    y = F.scaled_dot_product_attention(tiles, around[0], around[1], attn_mask=seen)  # (B heads, T, t t', D)
    y = y.unflatten(2, (row_q.shape[1], col_q.shape[1])).unflatten(1, (row_q.shape[0], col_q.shape[0]))
    y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B heads, Ty t, Tx t', D)
    y = y.index_select(1, row_index).index_select(2, col_index).flatten(1, 2).unflatten(0, (q.shape[0], q.shape[1]))
    first = softmax_attention(q[:, :, :prefix], k, v, mask)
    return torch.cat([first, y], dim=2)


class WindowMixer(Mixer):
    """Attention of each query to a window around it (equations: see the module; other arguments: see `Mixer`).

    Args:
        kernel: Keys of a window along an axis, or along rows and columns.
        dilation: Steps between them.
        stride: Queries along an axis that share a window; at most the kernel.
        border: `"inward"`, `"shrink"` or `"zero"`.
        trained_tokens: Tokens L0 of the grid that a model was trained on, for the scale sqrt(log L / log L0) of the
            logits at L tokens; None: no such scale.

    Raises:
        InputError: An unknown border, a size below 1, or a stride above the kernel.
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
        """As many keys a query as a window has."""
        return 2 * n * min(self.kernel[0] * self.kernel[1], m) * self.dim
