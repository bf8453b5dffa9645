r"""Mixture of heads: each token selects heads and weights their outputs.

    y = W_o concat_i(g_i H_i)                H_i: the output of softmax attention's head i, (N, D)

The first S heads are shared and always on; of the other E = heads - S each token chooses the K with the largest
p = softmax(W_r x). With [a_1, a_2] = softmax(W_h x):

    form "code"    g_i = 2 a_1 S softmax(W_s x)_i          shared; 1 instead of S softmax where S = 1
                   g_i = 2 a_2 K p_i / sum of the K        chosen, 0 for the rest
    form "paper"   g_i = a_1 softmax(W_s x)_i              shared
                   g_i = a_2 p_i                           chosen, 0 for the rest

For K = 1 the code's gate of the chosen head is 2 a_2 for every p: only the balance loss then trains W_r.

Without routed heads (E = 0 or K = 0) g = S softmax(W_s x), or softmax(W_s x) in the paper's form: dense gates, the
control that shows what routing adds (`GatedHeadsMixer`). Without shared heads a_1 and a_2 are left out.

    balance loss = E sum_i P_i f_i           P: mean of p over the tokens, f: fraction of the tokens that choose i

It equals K if all heads are chosen equally often. Add 0.01 times its mean over the layers to the loss.

Source: MoH, arXiv 2410.11842, and its authors' code, whose gates differ from the paper's and average 1 per active head.
The routers are named as in the code: wg = W_r, wg_0 = W_h, wg_1 = W_s.

Deviation. The gates multiply the outputs of all heads, as in the code: no head is skipped, so no time is saved. Routers
start at zero if all heads are on, so that the mixer starts as softmax attention, and close to zero otherwise.
"""

import torch
import torch.nn as nn
from torch import Tensor

from visionattn.errors import InputError
from visionattn.mixers.core import Grid, Maybe, Mixer, softmax_attention

__all__ = ["GatedHeadsMixer", "MixtureOfHeadsMixer"]

FORMS = ("code", "paper")


class MixtureOfHeadsMixer(Mixer):
    """Softmax attention with gates on its heads (equations: see the module; other arguments: see `Mixer`).

    Args:
        shared_heads: Number of heads S that are always on; None: half of all heads.
        routed_heads: Number K of the other heads that each token chooses; None: half of them, rounded up.
        form: `"code"` or `"paper"`.

    Raises:
        InputError: `form` is unknown, the numbers of heads are negative or exceed `num_heads`, or no head is routed
            although some are not shared.
    """

    supports = frozenset({"cross", "prefix", "mask", "any_grid", "bias", "script", "onnx"})
    limit = "form 'code', all other heads routed, routers of zero"
    equivariant = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        form: str = "code",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, device=device, dtype=dtype)
        dd = {"device": device, "dtype": dtype}
        shared = num_heads // 2 if shared_heads is None else shared_heads
        experts = num_heads - shared
        routed = (experts + 1) // 2 if routed_heads is None else routed_heads
        if form not in FORMS:
            raise InputError(f"form must be one of {', '.join(map(repr, FORMS))}; got {form!r}.")
        if shared < 0 or not 0 <= routed <= experts or shared + routed < 1:
            raise InputError(
                f"shared_heads and routed_heads must be at least 0, and together 1 to {num_heads}; got {shared} and "
                f"{routed}."
            )
        if not routed and experts:
            raise InputError(f"Without routed heads all {num_heads} heads must be shared; got shared_heads={shared}.")
        self.shared_heads, self.routed_heads = shared, routed
        self.in_code = form == "code"
        self.wg = nn.Linear(dim, experts, bias=False, **dd) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False, **dd) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, bias=False, **dd) if shared > 1 else None
        for router in (self.wg, self.wg_0, self.wg_1):
            if router is not None:
                nn.init.normal_(router.weight, std=0.0 if routed == experts else 0.02)

    def route(self, p: Tensor) -> Tensor:
        """Selection of heads per token, as ones and zeros: (B, N, E) -> (B, N, E)."""
        chosen = p.topk(self.routed_heads, dim=-1).indices
        return torch.zeros_like(p).scatter(-1, chosen, 1.0)

    def gates(self, x: Tensor) -> Tensor:
        """(B, N, C) -> gates of all heads (B, N, heads)."""
        shared = torch.ones_like(x[..., : min(self.shared_heads, 1)])  # (B, N, 1), or (B, N, 0) without shared heads
        if self.wg_1 is not None:
            shared = self.wg_1(x).softmax(dim=-1)
        if self.in_code:
            shared = shared * self.shared_heads
        if self.wg is None:
            return shared
        p = self.wg(x).softmax(dim=-1)
        routed = p * self.route(p)
        if self.in_code:
            routed = routed / routed.sum(dim=-1, keepdim=True) * self.routed_heads
        if self.wg_0 is not None:
            parts = self.wg_0(x).softmax(dim=-1) * (2.0 if self.in_code else 1.0)
            shared, routed = shared * parts[..., :1], routed * parts[..., 1:]
        return torch.cat([shared, routed], dim=-1)

    @torch.jit.ignore
    def balance_loss(self, x: Tensor) -> Tensor:
        """Loss that balances the tokens (B, N, C) over the routed heads: a scalar, 0 without routed heads."""
        if self.wg is None:
            return x.new_zeros(())
        p = self.wg(x).softmax(dim=-1)
        return p.shape[-1] * (p.mean(dim=(0, 1)) * self.route(p).mean(dim=(0, 1))).sum()

    def core(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, x: Tensor, mask: Maybe, bias: Maybe) -> Tensor:
        """Attend, then weight the heads."""
        return softmax_attention(q, k, v, mask, bias) * self.gates(x).transpose(1, 2)[..., None]

    @torch.jit.ignore
    def core_macs(self, n: int, m: int) -> int:
        """Attention with all heads, and the routers."""
        return 2 * n * m * self.dim + n * self.extra_parameters()


class GatedHeadsMixer(MixtureOfHeadsMixer):
    """Softmax attention with dense gates on its heads: control of `MixtureOfHeadsMixer` (arguments: see `Mixer`)."""

    limit = "a router of zero, as at the start"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        num_prefix_tokens: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, num_prefix_tokens, num_heads, 0, device=device, dtype=dtype)
