"""Match attention compared with its definition, and in a decoder layer.

    python -m benchmarks.kernels.match_attention --device cpu --reference FOLDER
    python -m benchmarks.kernels.match_attention --parts operator --size 384x1248
    python -m benchmarks.kernels.match_attention --device cuda --size 1536x1536 --reference FOLDER

Writes results/match_attention.csv, part by part; rows of other parts and devices stay. A form whose values are wrong is
not timed. Shapes are those of MatchStereo's tiny model: both views of one pair, 4 heads, at 1/4 of the image with 32
channels and radius 1, at 1/16 with 128 channels and radius 2. A training step gives the gradients of q, k, v and the
field by the output and by the attention; in a layer, those of its parameters and inputs.

Forms:
    definition  visionattn.kernels.match_attention.match_attention_definition: all windows gathered at once, in the
                order of steps that is fastest in ONNX Runtime
    operator    torch.ops.visionattn.match_attention
    authors     the authors' PyTorch form, from FOLDER, a checkout of their repository; its centres in float32
and on a GPU, in bfloat16 at two of the shapes:
    definition compiled  the same under torch.compile
    reductions           the operator, but keys and values get their gradients by atomic additions
    authors compiled     their PyTorch form under torch.compile
    authors' CUDA        their CUDA operator, inference alone, in float32: half precisions would round its centres. It
                         must have been built: see their INSTALL.md
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import RESULTS, write_rows
from benchmarks.runner import SEED, Implementation, Problem, arguments, measure
from benchmarks.stereo import match_stereo_authors
from visionattn.blocks import MatchLayer
from visionattn.kernels.match_attention import match_attention_definition

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # the definition's gradients of bfloat16 keys are summed in it


@dataclass(frozen=True)
class Case:
    """Two maps of queries and keys, at a scale of an image."""

    height: int
    width: int
    dim: int
    radius: int
    shared: bool = False
    heads: int = 4

    def __str__(self) -> str:
        field = ", one field" if self.shared else ", a field for each head"
        return (
            f"2x{self.height}x{self.width}, {self.heads} heads of {self.dim // self.heads}, radius {self.radius}{field}"
        )


class Operator(nn.Module):
    """Output and attention concatenated, so that both get a gradient."""

    radius: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.visionattn.match_attention(q, k, v, field, self.radius, "l1")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> Tensor:
        return torch.cat(self.attend(q, k, v, field), -1)


class Definition(Operator):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
        return match_attention_definition(q, k, v, field, self.radius, "l1")


class Reductions(Operator):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
        from benchmarks.kernels.match_reductions import MatchAttentionByReductions  # needs Triton

        return MatchAttentionByReductions.apply(q, k, v, field, self.radius, "l1")


class Authors(Operator):
    """The steps of the authors' layer between its projections."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
        theirs, (H, W, heads, D) = import_module("models.mat_pytorch_impl"), q.shape[1:]
        centres, window = self.centres(field, heads), [self.radius, self.radius]
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
        scores, rows = theirs.compute_match_attention(q, k, centres.floor().int(), window, H, W)
        weights = theirs.compute_bilinear_weights(centres).to(q.dtype)
        attention = theirs.compute_bilinear_softmax(scores * D**-0.5, weights, window)
        out = theirs.attention_aggregate(v, attention, rows, window)
        return out.view(-1, H, W, heads, D), attention.view(-1, H, W, heads, attention.shape[-1])

    def centres(self, field: Tensor, heads: int) -> Tensor:
        """Centres of windows, (B, H W, heads, 2)."""
        H, W = field.shape[1:3]
        limits = [
            (torch.arange(size, device=field.device, dtype=field.dtype), size - 1 - self.radius - 1e-3)
            for size in (W, H)
        ]
        (x, last_x), (y, last_y) = limits
        x = (field[..., 0] + x[:, None]).clamp(self.radius, last_x)
        y = (field[..., 1] + y[:, None, None]).clamp(self.radius, last_y)
        return torch.stack((x, y), -1).expand(-1, -1, -1, heads, -1).flatten(1, 2)


class AuthorsCuda(Authors):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
        fused, (H, W, heads, D) = import_module("models.match_former_ops").MF_FusedForwardOps(), q.shape[1:]
        rows, count = [x.flatten(3).flatten(1, 2) for x in (q, k, v)], (2 * self.radius + 2) ** 2
        centres, window = self.centres(field, heads).contiguous(), [self.radius, self.radius]
        out, attention = fused(centres, *rows, H, W, window, count, attn_type="l1_norm", scale=D**-0.5)
        return out.view(-1, H, W, heads, D), attention.view(-1, H, W, heads, count)


FORMS: dict[str, type[Operator]] = {
    "definition": Definition,
    "operator": Operator,
    "reductions": Reductions,
    "authors": Authors,
    "authors' CUDA": AuthorsCuda,
}


def attention(form: str, case: Case, dtype: torch.dtype, device: str) -> Problem:
    """A call whose centres are some pixels off, in eighths of a pixel: away from integers, where gradients jump."""
    torch.manual_seed(SEED)
    module = FORMS[form.removesuffix(" compiled")]()
    module.radius = case.radius
    if form.endswith(" compiled"):
        module.compile(dynamic=False)
    size = (2, case.height, case.width, case.heads)
    # Halves and quarters, and keys between them: no key equals a query in any number, whatever the dtype.
    q = torch.randn(*size, case.dim // case.heads).mul(4).round().div(4)
    k = torch.randn_like(q).mul(4).round().div(4).add(1 / 8)
    field = torch.randn(*size[:3], 1 if case.shared else case.heads, 2).mul(32).floor().div(8).add(1 / 16)
    tensors = [x.to(device, dtype).requires_grad_() for x in (q, k, torch.randn_like(q))]
    window = (2 * case.radius + 2) ** 2
    cotangent = torch.randn(*size, case.dim // case.heads + window)
    return Problem(module, [*tensors, field.to(device).requires_grad_()], cotangent.to(device, dtype))


class ByDefinition(MatchLayer):
    """A layer whose attentions take the definition."""

    def forward(self, x: Tensor, field: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for part in (self.match_attention_self, self.match_attention_cross):
            part.attend = partial(attend_by_definition, part)
        return super().forward(x, field, positions)


def attend_by_definition(part: nn.Module, x: Tensor, other: Tensor, field: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (
        linear(y).unflatten(-1, (part.num_heads, -1)) for linear, y in ((part.q, x), (part.k, other), (part.v, other))
    )
    out, attention = match_attention_definition(q, k, v, field, part.radius, part.similarity)
    return out.flatten(-2), attention.flatten(-2)


class Layer(nn.Module):
    def __init__(self, layer: MatchLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, field: Tensor, positions: Tensor) -> Tensor:
        return torch.cat(self.layer(x, field, positions), -1)


def layers(form: type[MatchLayer], case: Case, dtype: torch.dtype, device: str) -> Problem:
    """A decoder layer whose fields are consistent enough that its mask is far from its threshold."""
    torch.manual_seed(SEED)
    layer = form(case.dim, case.heads, case.radius)
    x = torch.randn(2, case.height, case.width, case.dim)
    field = torch.zeros(2, case.height, case.width, 2)
    field[0, ..., 0], field[1, ..., 0] = -2.3125, 2.3125
    positions = torch.randn(2, case.height, case.width, 2 * case.heads).mul(8).floor().div(8).add(1 / 16)
    cotangent = torch.randn(2, case.height, case.width, case.dim + 4 + 2 * case.heads)
    inputs = [y.to(device, dtype).requires_grad_() for y in (x, field, positions)]
    return Problem(Layer(layer).to(device, dtype), inputs, cotangent.to(device, dtype))


def scales(height: int, width: int, shared: bool) -> list[Case]:
    """The map at 1/4 and at 1/16 of an image."""
    return [Case(height // 4, width // 4, 32, 1, shared), Case(height // 16, width // 16, 128, 2, shared)]


def operator(device: str, repeats: int, size: tuple[int, int], reference: Path | None) -> list[dict]:
    """The operator compared with its definition, with fields per head and shared; on a GPU with all forms."""
    cases = {torch.float32: [*scales(*size, False), *scales(*size, True)]}
    cases[torch.bfloat16] = cases[torch.float32]
    names = {dtype: ["definition", "operator"] + ["authors"] * bool(reference) for dtype in cases}
    if device == "cuda":
        fine, coarse = scales(*size, False)[0], scales(*size, True)[1]
        cases = {torch.bfloat16: [fine, coarse], torch.float32: [fine, coarse]}
        names[torch.bfloat16] += ["definition compiled", "reductions"]
        if reference:
            names[torch.bfloat16] += ["authors compiled"]
            names[torch.float32] += ["authors' CUDA"] * match_stereo_authors.cuda_operator_built()
    rows = []
    for dtype in cases:
        for case in cases[dtype]:
            definition = partial(attention, "definition")
            forms = {
                name: Implementation(
                    partial(attention, name),
                    definition,
                    "" if name != "authors' CUDA" else "which has no backward pass",
                )
                for name in names[dtype]
            }
            rows += measure("match_attention", case, forms, "definition", dtype, TOLERANCE[dtype], device, repeats)
    return rows


def block(device: str, repeats: int, size: tuple[int, int], reference: Path | None) -> list[dict]:
    """A decoder layer with the definition and with the operator."""
    rows = []
    for case in scales(*size, False):
        forms = {
            name: Implementation(partial(layers, form), partial(layers, ByDefinition))
            for name, form in {"definition": ByDefinition, "operator": MatchLayer}.items()
        }
        rows += measure("match_layer", case, forms, "definition", torch.float32, 1e-4, device, repeats)
    return rows


PARTS = {"operator": operator, "block": block}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="192x416", help="height x width of the images")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="checkout of the authors' repository")
    parser.add_argument("--dry", action="store_true", help="write no rows")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    if options.reference:
        match_stereo_authors.use(options.reference)
    given = options.device, options.repeats, (height, width), options.reference
    for part in options.parts:
        rows = [{"part": part, **row} for row in PARTS[part](*given)]
        if not options.dry:
            write_rows(RESULTS / "match_attention.csv", rows, key=("part", "device"))


if __name__ == "__main__":
    main()
