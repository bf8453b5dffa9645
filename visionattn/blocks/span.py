r"""SPAN's block: parameter-free attention, from the sign and magnitude of the features themselves.

A block takes x (B, C, H, W). Three 3 x 3 convolutions give features h, and an odd function of h weighs the sum of both:

    s1 = SiLU(conv1(x))
    h  = conv3(SiLU(conv2(s1)))
    O  = (h + x) * (sigmoid(h) - 0.5)         all (B, C, H, W)

The weight lies in (-1/2, 1/2) and is odd: strong features of either sign pass, weak ones are suppressed. No skip
bypasses the product.

Each convolution can be trained with branches and used as one. With gain g and zero padding of x before everything else,

    branches  W3 * (W2 * (W1 * x)) + Ws * x   W1 (gC_in, C_in, 1, 1), W2 (gC_out, gC_in, 3, 3), W3 (C_out, gC_out, 1, 1)
                                              and Ws (C_out, C_in, 1, 1), each with a bias B1, B2, B3, Bs
    fused     W * x + B
              W[o,i,u,v] = sum_{b,a} W3[o,b] W2[b,a,u,v] W1[a,i] + [u = v = centre] Ws[o,i]
              B[o]       = sum_b W3[o,b] (B2[b] + sum_{a,u,v} W2[b,a,u,v] B1[a]) + B3[o] + Bs[o]

which are also equal at the border, since the padding carries B1 through W1 as the interior does.

Source: SPAN, arXiv 2311.12770.

Deviations, and why. Fusing happens once, in float64, and deletes the branches; the authors' code fuses at every
call, in the dtype of the weights. The block returns s1 after its SiLU: this is what the authors' networks concatenate
(their SiLU works in place on the output of the convolution).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionattn.errors import InputError

__all__ = ["SPAB", "Conv3XC"]


class Conv3XC(nn.Module):
    """A 3 x 3 convolution, plain or with branches (equations: see the module).

    Args:
        in_chans: Input channels C_in.
        out_chans: Output channels C_out.
        gain: Width g of the branches as a multiple of the channels.
        branches: Build the branches, for training; `fuse` merges them into one convolution.

    Shape:
        (B, C_in, H, W) -> (B, C_out, H, W), any H and W.

    Raises:
        InputError: Channels or the gain are less than 1.
    """

    def __init__(
        self, in_chans: int, out_chans: int, gain: int = 2, branches: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if min(in_chans, out_chans, gain) < 1:
            raise InputError(f"Channels and gain must be at least 1; got {in_chans}, {out_chans} and {gain}.")
        self.in_chans = in_chans
        self.out_chans = out_chans
        self.gain = gain
        wide_in, wide_out = gain * in_chans, gain * out_chans
        self.conv = None if branches else nn.Conv2d(in_chans, out_chans, 3, padding=1, **dd)
        # The first 1 x 1 convolution pads, so that the 3 x 3 one needs no padding.
        self.expand = nn.Conv2d(in_chans, wide_in, 1, padding=1, **dd) if branches else None
        self.mix = nn.Conv2d(wide_in, wide_out, 3, **dd) if branches else None
        self.project = nn.Conv2d(wide_out, out_chans, 1, **dd) if branches else None
        self.skip = nn.Conv2d(in_chans, out_chans, 1, **dd) if branches else None

    def extra_repr(self) -> str:
        """Show the form in `print(model)`."""
        return f"{self.in_chans}, {self.out_chans}, gain={self.gain}, branches={self.conv is None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        if self.conv is not None:
            return self.conv(x)
        return self.project(self.mix(self.expand(x))) + self.skip(x)  # type: ignore[misc]

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> None:
        """Merge the branches into one 3 x 3 convolution, computed in float64; a fused layer stays unchanged."""
        if self.conv is not None:
            return
        w1, w2, w3, ws = (layer.weight.double() for layer in (self.expand, self.mix, self.project, self.skip))
        b1, b2, b3, bs = (layer.bias.double() for layer in (self.expand, self.mix, self.project, self.skip))
        w1, w3 = w1.flatten(1), w3.flatten(1)
        weight = torch.einsum("ob,bauv,ai->oiuv", w3, w2, w1)
        weight[:, :, 1, 1] += ws.flatten(1)
        bias = w3 @ (b2 + w2.sum((2, 3)) @ b1) + b3 + bs
        self._become_one(weight, bias)

    @torch.jit.ignore
    @torch.no_grad()
    def unfuse(self) -> None:
        """Replace the one convolution by branches that compute exactly the same; a layer with branches stays unchanged.

        The first 1 x 1 convolution copies the channels, the 3 x 3 one reads the first copy and writes its result to
        all copies, the last 1 x 1 one reads the first of them, and the skip is zero. All branches receive gradients.
        """
        if self.conv is None:
            return
        weight, bias = self.conv.weight, self.conv.bias
        training, learns = self.training, weight.requires_grad
        other = Conv3XC(self.in_chans, self.out_chans, self.gain, True, device=weight.device, dtype=weight.dtype)
        for parameter in other.parameters():
            parameter.zero_()
        for copy in range(self.gain):
            nn.init.eye_(other.expand.weight.flatten(1)[copy * self.in_chans : (copy + 1) * self.in_chans])
            other.mix.weight[copy * self.out_chans : (copy + 1) * self.out_chans, : self.in_chans] = weight
        nn.init.eye_(other.project.weight.flatten(1)[:, : self.out_chans])
        other.project.bias.copy_(bias)
        self.expand, self.mix, self.project, self.skip = other.expand, other.mix, other.project, other.skip
        self.conv = None
        self.train(training).requires_grad_(learns)

    @torch.jit.ignore
    def _become_one(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        old = self.mix.weight
        self.conv = nn.Conv2d(
            self.in_chans, self.out_chans, 3, padding=1, device=old.device, dtype=old.dtype
        ).requires_grad_(old.requires_grad)
        self.conv.weight.copy_(weight)
        self.conv.bias.copy_(bias)
        self.expand = self.mix = self.project = self.skip = None
        self.conv.train(self.training)


class SPAB(nn.Module):
    """Swift parameter-free attention block (equations: see the module).

    Args:
        dim: Channels C.
        gain: See `Conv3XC`.
        branches: See `Conv3XC`.

    Shape:
        (B, C, H, W) -> the output O and the activated first convolution s1, both (B, C, H, W), any H and W.
    """

    def __init__(self, dim: int, gain: int = 2, branches: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = Conv3XC(dim, dim, gain, branches, **dd)
        self.conv2 = Conv3XC(dim, dim, gain, branches, **dd)
        self.conv3 = Conv3XC(dim, dim, gain, branches, **dd)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> O and s1, both (B, C, H, W)."""
        in_place = not self.training  # allocation costs time; autograd would copy overwritten tensors
        s1 = F.silu(self.conv1(x), inplace=in_place)
        h = self.conv3(F.silu(self.conv2(s1), inplace=in_place))
        return torch.ops.visionattn.symmetric_gate(h, x), s1
