"""Poolings whose weights come from the tokens themselves, without a learned query (notation: see the package)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.layers.cbam import CbamModule
from timm.models.vision_transformer import Block

from visionattn.probe.heads.poolings.base import Pooling, attend, check_heads, check_patches

__all__ = ["AbMilp", "Cbam", "ClassToken", "Clip", "DinoBlock", "Dolg", "LinearFreeSimPool", "Mean", "SimPool"]


class ClassToken(Pooling):
    """The first token, y = x_1: the linear probe on a class token."""

    tokens = "class"

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        return tokens[:, 0]


class Mean(Pooling):
    """The mean of the tokens, y = g: the linear probe on global average pooling."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        return tokens.mean(dim=1)


class Clip(Pooling):
    """CLIP's attention pool: y = W_O MHA_h(W_Q z_0, W_K z, W_V z), z = [mean_n LN x_n; LN x] + positions, with biases.

    z_0 is the row of the mean. CLIP attends from every row and reads the first.

    Source: CLIP, arXiv 2103.00020; the layer norm is the probe's.

    Args:
        dim: Width D of the tokens.
        grid: Height and width of the patches, N = H W.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, grid: tuple[int, int], num_heads: int = 4, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.grid = grid
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.pos_embed = nn.Parameter(torch.empty(grid[0] * grid[1] + 1, dim, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        trunc_normal_(self.pos_embed, std=dim**-0.5)
        trunc_normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.zeros_(self.qkv.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        check_patches(tokens, self.grid)
        z = self.norm(tokens)
        z = torch.cat([z.mean(dim=1, keepdim=True), z], dim=1) + self.pos_embed  # (B, 1 + N, D)
        widths = [self.out_dim, 2 * self.out_dim]
        (w_q, w_kv), (b_q, b_kv) = self.qkv.weight.split(widths), self.qkv.bias.split(widths)
        k, v = F.linear(z, w_kv, b_kv).chunk(2, dim=-1)
        return self.proj(attend(F.linear(z[:, :1], w_q, b_q), k, v, self.num_heads)).squeeze(1)


class SimPool(Pooling):
    """SimPool: y = softmax(W_Q g (W_K LN x)^T / sqrt(D)) LN x, without its power mean.

    Source: SimPool, arXiv 2309.06891.

    Args:
        dim: Width D of the tokens.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.out_dim = dim
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.q = nn.Linear(dim, dim, bias=False, **dd)
        self.k = nn.Linear(dim, dim, bias=False, **dd)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        z = self.norm(tokens)
        return attend(self.q(tokens.mean(dim=1, keepdim=True)), self.k(z), z).squeeze(1)


class LinearFreeSimPool(Pooling):
    """SimPool without linear maps: y = MHA_h(LN g, LN x, x), one layer norm for both.

    Source: based on SimPool, arXiv 2309.06891.

    Args:
        dim: Width D of the tokens.
        num_heads: Number h of heads; by default 12, or the next smaller divisor of D.
    """

    def __init__(self, dim: int, num_heads: int | None = None, device=None, dtype=None) -> None:
        super().__init__()
        if num_heads is None:  # 12 does not divide D = 1024, the width of a ViT-L
            num_heads = next(heads for heads in range(12, 0, -1) if dim % heads == 0)
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        mean = tokens.mean(dim=1, keepdim=True)
        return attend(self.norm(mean), self.norm(tokens), tokens, self.num_heads).squeeze(1)


class Cbam(Pooling):
    """CBAM: y = mean_n ReLU(x_n + c * s_n * x_n), with a channel gate c and a spatial gate s.

    c = sigmoid(f(mean_n x_n) + f(max_n x_n)), f: D -> D / 16 -> D with a ReLU and no biases
    s = sigmoid(BN(7 x 7 convolution of [mean, max] over the channels of c * x)) on the H x W grid

    Source: CBAM, arXiv 1807.06521, as timm's `CbamModule`.

    Args:
        dim: Width D of the tokens.
        grid: Height and width of the patches, N = H W.
    """

    def __init__(self, dim: int, grid: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        self.out_dim = dim
        self.grid = grid
        self.gates = CbamModule(dim, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        check_patches(tokens, self.grid)
        x = tokens.transpose(1, 2).unflatten(2, self.grid)  # (B, D, H, W)
        return F.relu(x + self.gates(x)).mean(dim=(2, 3))


class Dolg(Pooling):
    """DOLG's spatial attention, from DELF: z = BN(W_1 x + b_1), y = mean_n softplus(w_2 ReLU(z_n) + b_2) z_n / |z_n|.

    There is no softmax: the scores are independent.

    Sources: DOLG, arXiv 2108.02927; DELF, arXiv 1612.06321.

    Args:
        dim: Width D of the tokens.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.out_dim = dim
        self.project = nn.Linear(dim, dim, **dd)
        self.bn = nn.BatchNorm1d(dim, **dd)
        self.score = nn.Linear(dim, 1, **dd)
        nn.init.normal_(self.project.weight, std=(2 / dim) ** 0.5)
        nn.init.normal_(self.score.weight, std=2**0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        z = self.bn(self.project(tokens).flatten(0, 1)).view_as(tokens)
        return (F.softplus(self.score(F.relu(z))) * F.normalize(z, dim=-1)).mean(dim=1)


class DinoBlock(Pooling):
    """The mean after one transformer block: r = x + W_O MHA_h(W_Q LN x, W_K LN x, W_V LN x), y = mean(r + MLP(LN r)).

    q, k and v have no bias, all other layers have one.

    Source: the block of DINOv2, arXiv 2304.07193.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads h.
    """

    def __init__(self, dim: int, num_heads: int = 8, device=None, dtype=None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.out_dim = dim
        self.block = Block(dim, num_heads, norm_layer=nn.LayerNorm, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        return self.block(tokens).mean(dim=1)


class AbMilp(Pooling):
    """Attention-based multiple-instance learning: y = sum_n a_n z_n, a = softmax over n of e(z_n).

    with self-attention     z = W_O MHA_1(W_Q x, W_K x, W_V x) + b, e(z) = w tanh(W z + b') + c
    plain                   z = x, e(z) = w z + c

    Source: "Beyond [cls]", arXiv 2412.03215, whose command line uses the plain form; its code defaults to the other.

    Args:
        dim: Width D of the tokens.
        self_attention: Use the form with self-attention.
    """

    def __init__(self, dim: int, self_attention: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.out_dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd) if self_attention else None
        self.proj = nn.Linear(dim, dim, **dd) if self_attention else None
        hidden = [nn.Linear(dim, dim, **dd), nn.Tanh()] if self_attention else []
        self.score = nn.Sequential(*hidden, nn.Linear(dim, 1, **dd))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, D)."""
        z = tokens
        if self.qkv is not None and self.proj is not None:
            z = self.proj(attend(*self.qkv(z).chunk(3, dim=-1)))
        return (self.score(z).softmax(dim=1).transpose(1, 2) @ z).squeeze(1)
