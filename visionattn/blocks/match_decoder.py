r"""The decoder of MatchStereo and MatchFlow: from two views' features to a field of relative positions for each.

Both views are processed in one batch, the first half left, the second half right: x~ is x with the
halves exchanged. A field f (2B, H, W, 2) is the position, (x, y) in pixels, of a pixel's match in the other view,
relative to the pixel.

The initial match, at the lowest scale, with q, k = W_q LN x of the left view, W_k LN x of the right. In stereo, by row,

    S[y, x, x'] = q[y, x] . k[y, x'] / sqrt(C)
    P[y, x, d]  = softmax over d of (S[y, x, x - d] where x >= d, else 0)         d = 0 .. W - 1
    P[y, x, d] <- P[y, d, d] where x < d
    d^          = argmax over d of the mean of P over d - 2 .. d + 2, zeros outside, kept in 2 .. W - 3
    p_j         = P[y, x, d^ + j] where that is at least 1 / W, else 0            j = -2 .. 2
    f           = (-sum over j of p_j (d^ + j) / sum over j of p_j, 0)            0 if all p_j are

and for the right view the same on mirrored rows, with +. An impossible disparity enters the softmax with a score
of 0, and then gets the probability of its disparity at the nearest pixel that allows it. In flow, S (H W, H W) compares
all pixels, P is its softmax over those of the other view, means are over 5 x 5 elements of this matrix, in which
neighbours are consecutive pixels, sums over 5 x 5 pixels, and f is the mean position minus p.

A layer has a learned scale g (2,) and positions s (2B, H, W, 2h) of each of h heads for self-attention:

    n(p)     = 1 if |f(p) + f~(p + f(p))|_1 < 2, else 0                       f~ bilinear, zeros outside; no gradient
    x, f, s += Self(LN [x, g f, s], p + s, n)                                 the update of f divided by g
    x, f    += Cross(LN [x, g f], the same of the other view, p + f)          likewise
    x       += W_2 (GELU(DW a) * b) + b_2     [a, b] = W_1 LN x + b_1         DW: 3 x 3 by channel, with a bias

In stereo, y of f is set to 0 after each attention.

Convex upsampling by k replaces each pixel by k x k averages of the field at 3 x 3 around it, zeros outside the map:

    w   = softmax over the 9 neighbours of the 9 k^2 outputs W'' ReLU(W' * F) at each pixel
    up  = sum over the 9 neighbours of w (k f)                                    (B, k H, k W, 2)

Source: MatchAttention, arXiv 2510.14260.

Deviations, and why. Fields and positions keep their input dtype, float32 from the initial match on, and receive
updates: the authors carry them in the tokens, where half precision rounds them; without rounding both are the same.
The initial disparities are gathered at once, where the authors loop over them: such a loop cannot be exported.
"""

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from visionattn.blocks.match import MatchAttention, MatchCrossAttention

__all__ = [
    "ConvGLU",
    "ConvexUpsampling",
    "CorrelationStart",
    "MatchLayer",
    "convex_upsample",
    "exchange_views",
    "visible_pixels",
]


def exchange_views(x: torch.Tensor) -> torch.Tensor:
    """Exchange the halves of a batch, (2B, ...) -> (2B, ...)."""
    half = x.shape[0] // 2
    return torch.cat([x[half:], x[:half]])


def visible_pixels(field: torch.Tensor, threshold: float = 2.0) -> torch.Tensor:
    """Mark pixels whose match points back to them.

    Args:
        field: f of both views, (2B, H, W, 2).
        threshold: Allowed distance from the pixel, in pixels, |x| + |y|.

    Returns:
        n, (2B, H, W, 1): 1 for non-occluded pixels, 0 for others.
    """
    field = field.detach()
    H, W = field.shape[1:3]
    x = torch.arange(W, dtype=field.dtype, device=field.device)
    y = torch.arange(H, dtype=field.dtype, device=field.device).unsqueeze(1)
    # Corners of the map are at -1 and 1.
    grid = torch.stack([(x + field[..., 0]) * (2 / (W - 1)) - 1, (y + field[..., 1]) * (2 / (H - 1)) - 1], -1)
    back = F.grid_sample(exchange_views(field).permute(0, 3, 1, 2), grid, align_corners=True)
    distance = (field + back.permute(0, 2, 3, 1)).abs().sum(-1, keepdim=True)
    return (distance < threshold).to(field.dtype)


class ConvGLU(nn.Module):
    """MLP with hidden units gated by their neighbourhood (equations: see the module).

    Args:
        dim: Channels C.
        dim_hidden: Channels of each hidden half; 2C if None.

    Shape:
        (B, H, W, C) -> (B, H, W, C), any H and W.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = 2 * dim if dim_hidden is None else dim_hidden
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        a, b = self.fc1(x).chunk(2, -1)
        a = self.dwconv(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(a) * b)


class MatchLayer(nn.Module):
    """A decoder layer: self-attention, cross-attention, MLP (equations: see the module).

    Args:
        dim: Channels C of the features, and width of the attentions.
        num_heads: Heads h.
        radius: Radius r of a sub-window.
        flow: Keep the y of fields; without it, rows match rows only.

    Shape:
        x (2B, H, W, C), field (2B, H, W, 2), positions (2B, H, W, 2h) -> x, the field after self-attention, the field
            after cross-attention, positions. H and W at least 2r + 2.

    Raises:
        InputError: A size is less than 1, or C is not divisible by the heads.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, radius: int = 1, flow: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.flow = flow
        self.split = (dim, 2, 2 * num_heads)
        self.field_scale = nn.Parameter(torch.full((1, 1, 1, 2), 0.1, **dd))
        self.norm0 = nn.LayerNorm(sum(self.split), bias=False, **dd)
        self.match_attention_self = MatchAttention(sum(self.split), dim, num_heads, radius, **dd)
        self.norm1 = nn.LayerNorm(dim + 2, bias=False, **dd)
        self.match_attention_cross = MatchCrossAttention(dim + 2, dim, num_heads, radius, **dd)
        self.norm2 = nn.LayerNorm(dim, bias=False, **dd)
        self.mlp = ConvGLU(dim, **dd)

    def on_rows(self, field: torch.Tensor) -> torch.Tensor:
        """Set y to 0 in stereo."""
        return field if self.flow else F.pad(field[..., :1], (0, 1))

    def forward(
        self, x: torch.Tensor, field: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Update features, fields and positions of both views."""
        dim, two, heads = self.split
        visible = visible_pixels(field).to(x.dtype)

        z = torch.cat([x, (self.field_scale * field).to(x.dtype), positions.to(x.dtype)], -1)
        more = self.match_attention_self(self.norm0(z), positions.unflatten(-1, (heads // 2, 2)), visible)
        more_x, more_field, more_positions = more.split([dim, two, heads], -1)
        x, positions = x + more_x, positions + more_positions
        field_self = self.on_rows(field + more_field / self.field_scale)

        z = self.norm1(torch.cat([x, (self.field_scale * field_self).to(x.dtype)], -1))
        more_x, more_field = self.match_attention_cross(z, exchange_views(z), field_self.unsqueeze(3)).split(
            [dim, two], -1
        )
        x = x + more_x
        field_cross = self.on_rows(field_self + more_field / self.field_scale)

        return x + self.mlp(self.norm2(x)), field_self, field_cross, positions


def convex_upsample(field: torch.Tensor, logits: torch.Tensor, factor: int) -> torch.Tensor:
    """Upsample fields, each new pixel an average of 3 x 3 old ones, and scale their values by the factor.

    Args:
        field: (B, H, W, channels), in pixels of this resolution.
        logits: (B, H, W, 9 k^2), neighbours first, then rows and columns of new pixels.
        factor: k.

    Returns:
        (B, k H, k W, channels), in pixels of the new resolution.
    """
    H, W = field.shape[1:3]
    padded = F.pad(field.permute(0, 3, 1, 2) * factor, (1, 1, 1, 1)).unsqueeze(2)  # (B, channels, 1, H + 2, W + 2)
    logits = logits.permute(0, 3, 1, 2).unflatten(1, (9, factor * factor)).to(field.dtype)  # (B, 9, k k, H, W)
    # Products and sums of whole maps: autocast would round the fields in a matrix product, and in ONNX Runtime a
    # softmax over any axis but the last is several times slower.
    weights = (logits - logits.detach().amax(1, keepdim=True)).exp()
    up = padded[..., :H, :W] * weights[:, :1]
    for n in range(1, 9):
        up = up + padded[..., n // 3 : n // 3 + H, n % 3 : n % 3 + W] * weights[:, n : n + 1]
    up = up / weights.sum(1).unsqueeze(1)
    return F.pixel_shuffle(up.flatten(1, 2), factor).permute(0, 2, 3, 1)


class ConvexUpsampling(nn.Module):
    """Upsampling of fields by weights computed from features (equations: see the module).

    Args:
        dim: Channels of the features.
        factor: k.
        dim_hidden: Channels between the two convolutions; `dim` if None.

    Shape:
        features (B, H, W, C), field (B, H, W, channels) -> (B, k H, k W, channels), any H and W.
    """

    def __init__(self, dim: int, factor: int = 2, dim_hidden: int | None = None, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = dim if dim_hidden is None else dim_hidden
        self.factor = factor
        self.mask = nn.Sequential(
            nn.Conv2d(dim, hidden, 3, padding=1, **dd), nn.ReLU(), nn.Conv2d(hidden, 9 * factor**2, 1, **dd)
        )

    def forward(self, features: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C), (B, H, W, channels) -> (B, k H, k W, channels)."""
        logits = self.mask(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return convex_upsample(field, logits, self.factor)


class CorrelationStart(nn.Module):
    """The initial fields, from the correlation of each pixel with its row or the whole other view (see the module).

    Args:
        dim: Channels C.
        flow: Compare with all pixels of the other view instead of those of one row.

    Shape:
        (2B, H, W, C) -> (2B, H, W, 2), in float32 or float64; W at least 5, in flow H too.
    """

    def __init__(self, dim: int, flow: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.flow = flow
        self.norm = nn.LayerNorm(dim, bias=False, **dd)
        self.q = nn.Linear(dim, dim, bias=False, **dd)
        self.k = nn.Linear(dim, dim, bias=False, **dd)

    def match(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the initial fields and their probabilities.

        Returns:
            f (2B, H, W, 2), and P as (2B, H, W, W), disparities last, or in flow (2B, H W, H W), other pixels last.
        """
        x, half = self.norm(x), x.shape[0] // 2
        q, k = _widened(self.q(x[:half])), _widened(self.k(x[half:]))  # (B, H, W, C)
        q = q * self.q.weight.shape[0] ** -0.5
        if self.flow:
            return _flow_start(q, k)
        return _stereo_start(q, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(2B, H, W, C) -> (2B, H, W, 2)."""
        return self.match(x)[0]


@torch.fx.wrap  # as one node, since dtypes are unknown in a trace
def _widened(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _stereo_start(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    W = q.shape[2]
    scores = q @ k.transpose(-1, -2)  # (B, H, W, W): left x, right x'
    # Mirrored, the right view's matches lie on the same side as those of the left one.
    scores = torch.cat([scores, scores.transpose(-1, -2).flip(-1, -2)])
    disparity = torch.arange(W, device=q.device)
    x = disparity.unsqueeze(1)
    # Masked where it is negative, so any index will do; clamped integers become floats in Core ML.
    at = (x - disparity).abs().expand_as(scores)
    p = scores.gather(-1, at).masked_fill(x < disparity, 0).softmax(-1)  # (2B, H, x, d)
    p = p.gather(-2, torch.maximum(x, disparity).expand_as(p))
    best = F.avg_pool1d(p.flatten(0, 1), 5, stride=1, padding=2).unflatten(0, p.shape[:2]).argmax(-1, keepdim=True)
    taps = best.clamp(2, W - 3) + torch.arange(-2, 3, device=q.device)  # (2B, H, W, 5)
    found = _mean(p, taps, taps.unsqueeze(-1)).squeeze(-1)
    half = q.shape[0]
    field = F.pad(torch.cat([-found[:half], found[half:].flip(-1)]).unsqueeze(-1), (0, 1))
    return field, torch.cat([p[:half], p[half:].flip(-2)])


def _flow_start(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    H, W = q.shape[1:3]
    scores = q.flatten(1, 2) @ k.flatten(1, 2).transpose(-1, -2)  # (B, H W, H W): left, right
    p = torch.cat([scores, scores.transpose(-1, -2)]).softmax(-1)
    best = F.avg_pool2d(p.unsqueeze(1), 5, stride=1, padding=2).squeeze(1).argmax(-1, keepdim=True)
    row = torch.div(best, W, rounding_mode="floor")
    near = torch.arange(-2, 3, device=q.device)
    y = row.clamp(2, H - 3) + near[:, None].expand(5, 5).flatten()  # (2B, H W, 25)
    x = (best - row * W).clamp(2, W - 3) + near.repeat(5)
    found = _mean(p, y * W + x, torch.stack([x, y], -1)).unflatten(1, (H, W))
    own_x, own_y = torch.arange(W, device=q.device), torch.arange(H, device=q.device).unsqueeze(1)
    return found - torch.stack([own_x.expand(H, W), own_y.expand(H, W)], -1), p


def _mean(p: torch.Tensor, taps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mean of positions (..., n, 1 or 2) under the probabilities at taps (..., n), without those below average."""
    shares = p.gather(-1, taps)
    shares = shares * (shares >= 1 / p.shape[-1])
    total = shares.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)  # the result is 0, with zero gradients
    return (shares.unsqueeze(-1) * places).sum(-2) / total
