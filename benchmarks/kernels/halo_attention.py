"""Halo attention compared with timm's layer and other implementations: layers, growing maps, models, ONNX files.

    python -m benchmarks.kernels.halo_attention --device cpu
    python -m benchmarks.kernels.halo_attention --parts growth

Writes results/halo_attention.csv, part by part; rows of other parts and devices stay. All forms hold the same weights
and start from the same input; one whose values are wrong is not timed.

Forms of the layer, each with its projections:
    timm                       timm.layers.halo_attn.HaloAttn
    timm compiled              the same under torch.compile
    sdpa on gathered windows   windows by pad and Tensor.unfold, scaled_dot_product_attention with a bias
    flex attention             torch.compile over flex_attention: a block mask and a bias that it computes by itself
    definition                 the operator's definition
    operator                   visionattn.blocks.HaloAttention with timm's border and index
    operator, masked           the same with its own: nothing outside the map, rows by true distance
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnxruntime
import timm
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.report import RESULTS, environment, paired_milliseconds, summarize, write_rows
from benchmarks.runner import INFERENCE, SEED, Implementation, Problem, arguments, measure, run
from visionattn.blocks import HaloAttention
from visionattn.kernels.halo_attention import halo_attention_definition
from visionattn.surgery import accelerate

TOLERANCES = {"cpu": {torch.float32: 1e-5}, "cuda": {torch.bfloat16: 4e-2}}
# Of a whole network. In float32 timm's own gradients are up to 0.04 from those in float64: rounding decides about ReLUs
# near 0, and batch norms over few pixels make it larger. Half precisions are too far to tell right from wrong.
NETWORK_TOLERANCE = 0.1


@dataclass(frozen=True)
class Layer:
    """A layer and the square map that it meets."""

    batch: int
    dim: int
    size: int
    heads: int
    dim_head: int  # of queries and keys; that of the values is dim // heads
    block: int = 8
    halo: int = 3

    def __str__(self) -> str:
        width, values = self.dim_head, self.dim // self.heads
        heads = f"{self.heads} heads of {width}" + (f" and {values}" if values != width else "")
        return f"{self.batch}x{self.dim}x{self.size}x{self.size}, {heads}, block {self.block}, halo {self.halo}"


class Form(HaloAttention):
    """Our block's projections and tables around another way to compute the attention."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # what a form is: queries, keys and values to the output

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(1, (self.num_heads, self.dim_head))
        kv = self.kv(x).unflatten(1, (self.num_heads, self.dim_head + self.dim_head_v))
        return self.attend(q, *kv.split([self.dim_head, self.dim_head_v], dim=2)).flatten(1, 2)

    def blocks(self, x: Tensor) -> Tensor:
        """Queries block after block, (B, heads, ny, nx, b, b, D)."""
        b = self.block_size
        return x.unflatten(4, (-1, b)).unflatten(3, (-1, b)).permute(0, 1, 3, 5, 4, 6, 2)

    def unblocks(self, x: Tensor, like: Tensor) -> Tensor:
        """A map (B, heads, Dv, H, W) from rows block after block, (B, heads, H W, Dv)."""
        (B, heads, _, H, W), b = like.shape, self.block_size
        x = x.view(B, heads, H // b, W // b, b, b, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(B, heads, -1, H, W)


class Definition(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = self.pos_embed.height_rel, self.pos_embed.width_rel
        settings = self.block_size, self.halo_size, self.query_stride, self.border, self.index
        return halo_attention_definition(q, k, v, *tables, *settings)


class Strips(Definition):
    """The definition for large maps: strip by strip, of which a backward pass keeps the input alone.

    With no bias in the projections and keys of zeros outside the map, a strip is a map of its own, to which a row of
    blocks above and one below lend keys.
    """

    def forward(self, x: Tensor) -> Tensor:
        b, rows, attend = self.block_size, 4 * self.block_size, super().forward
        padded = F.pad(x, (0, 0, b, b))
        strips = [padded[:, :, y : y + rows + 2 * b] for y in range(0, x.shape[2], rows)]
        return torch.cat([checkpoint(attend, strip, use_reentrant=False)[:, :, b:-b] for strip in strips], 2)


class Gathered(Form):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, heads, D, H, W = q.shape
        b, h, w = self.block_size, self.halo_size, self.block_size + 2 * self.halo_size
        q = self.blocks(q)
        row = w - 1 + torch.arange(w, device=q.device) - torch.arange(b, device=q.device)[:, None]
        height = torch.einsum("bmnoyxd,yjd->bmnoyxj", q, self.pos_embed.height_rel[row])
        width = torch.einsum("bmnoyxd,xjd->bmnoyxj", q, self.pos_embed.width_rel[row])
        bias = (height[..., None] + width[..., None, :]).flatten(6).flatten(4, 5)

        def windows(x: Tensor) -> Tensor:
            x = F.pad(x, (h, h, h, h)).unfold(3, w, b).unfold(4, w, b)  # (B, heads, D, ny, nx, w, w)
            return x.permute(0, 1, 3, 4, 5, 6, 2).reshape(-1, 1, w * w, x.shape[2])

        q = q.reshape(-1, 1, b * b, D)
        y = F.scaled_dot_product_attention(q, windows(k), windows(v), attn_mask=bias.reshape(len(q), 1, b * b, w * w))
        return self.unblocks(y.view(B, heads, H * W, -1), v)


compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


class Flex(Form):
    """Queries block after block against the padded map of keys, row by row; other windows' keys are masked."""

    def place(self, size: int, device: str) -> None:
        b, h, w = self.block_size, self.halo_size, self.block_size + 2 * self.halo_size
        across, padded = size // b, size + 2 * h

        def coordinates(q_index: Tensor, k_index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            block, inside = q_index // b**2, q_index % b**2
            key_y, key_x = k_index // padded - block // across * b, k_index % padded - block % across * b
            return inside // b, inside % b, key_y, key_x

        def in_window(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            *_, y, x = coordinates(q_index, k_index)
            return (y >= 0) & (y < w) & (x >= 0) & (x < w)

        self.coordinates = coordinates
        self.mask = create_block_mask(in_window, None, None, size**2, padded**2, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h, w = self.halo_size, self.block_size + 2 * self.halo_size
        q = self.blocks(q).flatten(2, 5).contiguous()  # (B, heads, H W, D)
        height, width = q @ self.pos_embed.height_rel.T, q @ self.pos_embed.width_rel.T

        def relative(score: Tensor, batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            query_y, query_x, key_y, key_x = self.coordinates(q_index, k_index)
            row = (w - 1 + key_y - query_y).clamp(0, 2 * w - 2)  # beyond the table where the mask hides the key
            column = (w - 1 + key_x - query_x).clamp(0, 2 * w - 2)
            return score + height[batch, head, q_index, row] + width[batch, head, q_index, column]

        padded = [F.pad(x, (h, h, h, h)).flatten(3).transpose(2, 3).contiguous() for x in (k, v)]
        y = compiled_flex_attention(q, *padded, score_mod=relative, block_mask=self.mask)
        return self.unblocks(y, v)


FORMS: dict[str, type[nn.Module]] = {
    "timm": HaloAttn,
    "sdpa on gathered windows": Gathered,
    "flex attention": Flex,
    "definition": Definition,
    "definition in strips": Strips,
    "operator": HaloAttention,
}


def layer(form: str, case: Layer, dtype: torch.dtype, device: str) -> Problem:
    """One layer, with the weights and the input that all forms of the case share."""
    torch.manual_seed(SEED)
    settings = {"num_heads": case.heads, "dim_head": case.dim_head, "block_size": case.block, "halo_size": case.halo}
    weights = HaloAttention(case.dim, **settings).state_dict()
    x, cotangent = (torch.randn(case.batch, case.dim, case.size, case.size).to(device, dtype) for _ in range(2))
    name, _, addition = form.partition(", ")
    name = name.removesuffix(" compiled")
    if name != "timm" and addition != "masked":
        settings |= {"border": "zero", "index": "timm"}
    module = FORMS[name](case.dim, **settings)
    module.load_state_dict(weights)
    module.to(device, dtype)
    if isinstance(module, Flex):
        module.place(case.size, device)
    if form.endswith(" compiled"):
        module = torch.compile(module, dynamic=False)
    return Problem(module, [x.requires_grad_()], cotangent)


def network(form: str, case: str, dtype: torch.dtype, device: str) -> Problem:
    """A timm model on two images; zeros at the ends of its branches would hide wrong gradients."""
    torch.manual_seed(SEED)
    module = timm.create_model(case, zero_init_last=False).to(device, dtype)
    images, cotangent = (torch.randn(*shape).to(device, dtype) for shape in [(2, 3, 256, 256), (2, 1000)])
    if form == "accelerated":
        module = accelerate(module)
    if form == "timm compiled":
        module = torch.compile(module, dynamic=False)
    return Problem(module, [images], cotangent)


def forms(*names: str, definition: str = "definition", no_training: str = "") -> dict[str, Implementation]:
    return {name: Implementation(partial(layer, name), partial(layer, definition), no_training) for name in names}


def layers(device: str, repeats: int) -> list[dict]:
    """The layer at the head widths of HaloNet and of timm's models."""
    masked = forms("operator, masked", definition="definition, masked")
    rows = []
    for case in LAYERS[device]:
        flex = forms("flex attention", no_training="which has no backward pass on CPUs" if device == "cpu" else "")
        implementations = forms("timm", "timm compiled", "sdpa on gathered windows") | flex
        implementations |= forms("definition", "operator") | masked
        for dtype, tolerance in TOLERANCES[device].items():
            rows += measure("halo_attention", case, implementations, "timm", dtype, tolerance, device, repeats)
    return rows


def growth(device: str, repeats: int) -> list[dict]:
    """One image of growing size; on a CPU, which takes minutes for the largest, its memory alone."""
    implementations = forms("timm", "sdpa on gathered windows", "operator", definition="definition in strips")
    rows = []
    for case in GROWING:
        rounds = max(3, repeats * 128**2 // max(128, case.size) ** 2)
        if device == "cpu" and case.size == 1024:
            rounds = 0
        for dtype, tolerance in TOLERANCES[device].items():
            rows += measure(
                "halo_attention", case, implementations, "timm", dtype, tolerance, device, rounds, GROWING[0]
            )
    return rows


def models(device: str, repeats: int) -> list[dict]:
    """Whole timm models, in which a few layers of many are halo attention."""
    definition = partial(network, "timm")
    implementations = {
        form: Implementation(partial(network, form), definition) for form in ("timm", "timm compiled", "accelerated")
    }
    rows = []
    for case in NETWORKS:
        rows += measure(
            "halo_attention", case, implementations, "timm", torch.float32, NETWORK_TOLERANCE, device, repeats
        )
    return rows


def exported(device: str, repeats: int) -> list[dict]:
    """The layer as a file in ONNX Runtime on the CPU, by the form that was exported; PyTorch's operator beside it."""
    if device != "cpu":
        return []
    case, dtype = Layer(1, 64, 112, heads=4, dim_head=16), torch.float32
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    _, (x,), _ = problem = layer("operator", case, dtype, device)
    expected = run(problem, INFERENCE)[0]
    calls: dict[str, Callable[[], object]] = {"operator, in PyTorch": partial(run, problem, INFERENCE)}
    for form in ("definition", "sdpa on gathered windows", "timm"):
        program = torch.onnx.export(layer(form, case, dtype, device).module.eval(), (x.detach(),), dynamo=True)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
        feed = {session.get_inputs()[0].name: x.detach().numpy()}
        calls[f"{form}, in ONNX Runtime"] = partial(session.run, None, feed)
        error = (torch.from_numpy(session.run(None, feed)[0]) - expected).abs().max().item()
        if not error <= 1e-5 * expected.abs().max().item():
            raise SystemExit(f"{form} in ONNX Runtime: error {error:.1e}. Nothing was timed.")
    columns = summarize(paired_milliseconds(calls, device, repeats), "timm, in ONNX Runtime")
    fixed = {"op": "halo_attention", "pass": INFERENCE, "case": str(case), "dtype": "float32"}
    rest = {"peak_mib": "", "threads": torch.get_num_threads(), **environment(device), "seed": SEED}
    return [{**fixed, "implementation": name, **columns[name], **rest} for name in calls]


LAYERS = {
    "cpu": [
        Layer(4, 64, 56, heads=8, dim_head=8),
        Layer(4, 64, 56, heads=4, dim_head=16),
        Layer(4, 128, 32, heads=4, dim_head=32),
        Layer(4, 256, 16, heads=8, dim_head=32),
        Layer(4, 512, 16, heads=8, dim_head=64),
        Layer(4, 864, 14, heads=8, dim_head=36, block=7, halo=2),
    ],
    # Fewer and larger: compiled forms take most of the minutes.
    "cuda": [
        Layer(64, 64, 56, heads=4, dim_head=16),
        Layer(256, 128, 32, heads=4, dim_head=32),
        Layer(256, 512, 16, heads=8, dim_head=64),
    ],
}
GROWING = [Layer(1, 64, size, heads=4, dim_head=16) for size in (56, 128, 256, 512, 1024)]
NETWORKS = ["halonet26t", "halonet50ts"]
PARTS = {"layer": layers, "growth": growth, "model": models, "onnx": exported}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for part in options.parts:
        rows = [{"part": part, **row} for row in PARTS[part](options.device, options.repeats)]
        if rows:
            write_rows(RESULTS / "halo_attention.csv", rows, key=("part", "device"))


if __name__ == "__main__":
    main()
