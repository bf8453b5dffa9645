r"""Subspace attention (ULSAM): one spatial attention map per group of channels, from two parameters per channel.

The C channels of x (B, C, H, W) are split into g subspaces F_n of G = C / g adjacent channels, each with its own
attention map:

    A_n = softmax over H W of PW(maxpool_3x3(DW(F_n)))      (B, 1, H, W), sums to 1
    Y_n = F_n (1 + A_n)                                     (B, G, H, W)

DW is a 1 x 1 depthwise convolution, one parameter per channel; PW a 1 x 1 convolution with one filter: 2 C parameters
for any g, and 2 C H W multiply-accumulates. The pool has stride 1 and pads with -inf.

`form` selects the layers around the convolutions:

    paper     the equations above
    module    as in the authors' code: both convolutions with a bias, then batch norm (momentum 0.9) and ReLU; 5 C + 3 g
              parameters. ReLU gives all positions of negative logits the same weight.

`gain` selects what multiplies x:

    paper     1 + A_n. A is 1 / (H W) on average, so that the block is nearly the identity: its mean gain is 1.0051 at
              14 x 14 and 1.0003 at 56 x 56.
    scaled    1 + H W A_n: a mean gain of 2 at every size.
    learned   1 + lambda_n H W A_n, one more parameter per subspace; initialised to 0, so that an inserted block changes
                      nothing at first.

Source: ULSAM, arXiv 2006.15102.

Deviations, and why. All subspaces are computed at once, by one operator, instead of in g branches. `scaled` and
`learned` are not in the paper: they make the map effective at any size. In training, a bias before batch norm cancels
out: it is stored, as in the authors' module, and its gradient is 0.
"""

import torch
import torch.nn as nn

from visionattn.errors import InputError

__all__ = ["SubspaceAttention"]

FORMS = ("paper", "module")
GAINS = ("paper", "scaled", "learned")

# Entries of a subspace in the authors' state dict -> ours.
PUBLISHED = {
    "conv_dws.weight": "scale",
    "conv_dws.bias": "shift",
    "conv_point.weight": "point",
    "conv_point.bias": "offset",
    **{
        f"{theirs}.{entry}": f"{ours}.{entry}"
        for theirs, ours in {"bn_dws": "norm", "bn_point": "norm_logits"}.items()
        for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}


def fold_norm(
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of the preceding convolution's weight, and the folded bias, both (K,)."""
    slope = norm_weight * (var + eps).rsqrt()
    return slope, norm_bias + (bias - mean) * slope


class SubspaceAttention(nn.Module):
    """A spatial gate for each group of channels (equations: see the module).

    A state dict of the authors' module (keys `subspaces.N.conv_dws.weight` and so on) loads into `form="module"`
    directly.

    Args:
        dim: Channels C.
        num_subspaces: Subspaces g. C must be divisible by it.
        form: `"paper"` or `"module"`.
        gain: `"paper"`, `"scaled"` or `"learned"`.

    Shape:
        (B, C, H, W) -> (B, C, H, W), any H and W.

    Raises:
        InputError: The channels are not divisible by the subspaces, or a choice is unknown.
    """

    is_gate = True  # `visionattn.insert` inserts it after a layer without a skip connection

    def __init__(
        self,
        dim: int,
        num_subspaces: int = 4,
        form: str = "paper",
        gain: str = "paper",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if num_subspaces < 1 or dim < 1 or dim % num_subspaces:
            raise InputError(f"dim ({dim}) must be divisible by num_subspaces ({num_subspaces}).")
        if form not in FORMS:
            raise InputError(f"form must be one of {', '.join(map(repr, FORMS))}; got {form!r}.")
        if gain not in GAINS:
            raise InputError(f"gain must be one of {', '.join(map(repr, GAINS))}; got {gain!r}.")
        g, module = num_subspaces, form == "module"
        self.rectify = module
        self.scaled = gain != "paper"
        self.scale = nn.Parameter(torch.empty(dim, **dd))  # DW
        self.point = nn.Parameter(torch.empty(g, dim // g, **dd))  # PW
        self.gain = nn.Parameter(torch.empty(g, **dd)) if gain == "learned" else None
        self.shift = nn.Parameter(torch.empty(dim, **dd)) if module else None
        self.offset = nn.Parameter(torch.empty(g, **dd)) if module else None
        self.eps = 1e-5
        self.norm = nn.BatchNorm2d(dim, self.eps, momentum=0.9, **dd) if module else None
        self.norm_logits = nn.BatchNorm2d(g, self.eps, momentum=0.9, **dd) if module else None
        self.register_load_state_dict_pre_hook(_convert_published)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise like PyTorch convolutions of these shapes, a learned gain to 0."""
        for weight, bias, fan_in in ((self.scale, self.shift, 1), (self.point, self.offset, self.point.shape[1])):
            for parameter in (weight, bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        for norm in (self.norm, self.norm_logits):
            if norm is not None:
                norm.reset_parameters()
        if self.gain is not None:
            nn.init.zeros_(self.gain)

    def extra_repr(self) -> str:
        """Show the form in `print(model)`."""
        form, gain = FORMS[self.rectify], GAINS[self.scaled + (self.gain is not None)]
        return f"{self.scale.shape[0]}, subspaces={self.point.shape[0]}, form={form}, gain={gain}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.norm is None:
            y, _ = torch.ops.visionattn.subspace_attention(
                x, self.scale, self.shift, self.point, None, self.offset, self.gain, self.rectify, self.scaled, 0.0
            )
        elif self.training:
            y = self.forward_of_batch(x)
        else:
            y = self.forward_of_running(x)
        return y

    def forward_of_running(self, x: torch.Tensor) -> torch.Tensor:
        """The module form with running statistics: batch norm is folded into scale, shift, point and offset."""
        first, second = self.norm, self.norm_logits
        slope, shift = fold_norm(self.shift, first.running_mean, first.running_var, first.weight, first.bias, self.eps)
        slope_logits, offset = fold_norm(
            self.offset, second.running_mean, second.running_var, second.weight, second.bias, self.eps
        )
        scale, point = self.scale * slope, self.point * slope_logits[:, None]
        y, _ = torch.ops.visionattn.subspace_attention(
            x, scale, shift, point, None, offset, self.gain, True, self.scaled, 0.0
        )
        return y

    def forward_of_batch(self, x: torch.Tensor) -> torch.Tensor:
        """The module form with batch statistics, which update the running ones."""
        first, second = self.norm, self.norm_logits
        # DW is an affine map of x: its statistics are those of x, mapped.
        pixels, count = x.flatten(2), x.shape[0] * x.shape[2] * x.shape[3]
        mean = pixels.sum(2).sum(0) / count  # (C,)
        var = (pixels - mean[:, None]).square().sum(2).sum(0) / count * self.scale.square()
        mean = mean * self.scale
        # A bias before the norm cancels out, but distributed training expects a gradient for it.
        slope, shift = fold_norm(0 * self.shift, mean, var, first.weight, first.bias, self.eps)
        offset = second.bias + 0 * self.offset
        y, logits = torch.ops.visionattn.subspace_attention(
            x, self.scale * slope, shift, self.point, second.weight, offset, self.gain, True, self.scaled, self.eps
        )
        # The norms are called only to update their running statistics; two pixels can represent those of all.
        self.norm_logits(logits.detach() + self.offset[:, None, None])  # type: ignore[misc]
        apart = (var * (count / (count - 1) / 2)).sqrt()
        mean = mean + self.shift
        self.norm(torch.stack([mean - apart, mean + apart]).detach()[:, :, None, None])  # type: ignore[misc]
        return y

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> None:
        """Fold both batch norms into the convolutions, in float64; without any, the block stays unchanged.

        The fused block uses the running statistics, in training too.
        """
        if self.norm is None:
            return
        for norm, weight, bias in ((self.norm, self.scale, self.shift), (self.norm_logits, self.point, self.offset)):
            mean, var, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
            slope, folded = fold_norm(
                bias.double(), mean.double(), var.double(), gamma.double(), beta.double(), self.eps
            )
            weight.copy_(weight * slope if weight.ndim == 1 else weight * slope[:, None])
            bias.copy_(folded)
        self.norm = self.norm_logits = None


def _convert_published(module, state_dict, prefix, *_) -> None:
    """Convert the entries of the authors' module to ours, in place; other state dicts stay unchanged."""
    number = 0
    parts: dict[str, list[torch.Tensor]] = {}
    while f"{prefix}subspaces.{number}.conv_dws.weight" in state_dict:
        for theirs, ours in PUBLISHED.items():
            value = state_dict.pop(f"{prefix}subspaces.{number}.{theirs}", None)
            if value is not None:
                parts.setdefault(ours, []).append(value)
        number += 1
    for name, values in parts.items():
        if name == "point":
            state_dict[prefix + name] = torch.cat(values).flatten(1)
        elif name.endswith("num_batches_tracked"):
            state_dict[prefix + name] = values[0]
        else:
            state_dict[prefix + name] = torch.cat([value.flatten() for value in values])
