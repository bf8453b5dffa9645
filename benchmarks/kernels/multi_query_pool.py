"""Efficient probing compared with the authors' order of operations and with multi-head attention, and its operator.

    python -m benchmarks.kernels.multi_query_pool --device cpu
    python -m benchmarks.kernels.multi_query_pool --parts operator

Writes results/multi_query_pool.csv, part by part; rows of other parts and devices stay. A form whose values are wrong
is not timed. The tokens are frozen, as those of a backbone are: a training step gives the gradients of the parameters,
and those of the tokens only where stated.

Forms of the pooling:
    values first         the authors' order: all tokens are projected to values, which the queries then average
    EfficientProbing     visionattn.blocks.EfficientProbing: tokens are averaged, then projected
    one after the other  the probes of a stacked case by an EfficientProbing each
    multi-head           AIM's probe: batch norm of the tokens, keys and values in one projection, one learned query,
                         scaled_dot_product_attention over 16 heads; it has no number of queries to choose
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import RESULTS, write_rows
from benchmarks.runner import SEED, Implementation, Problem, arguments, measure
from visionattn.blocks import EfficientProbing
from visionattn.kernels.multi_query_pool import multi_query_pool_definition

# In bfloat16 the definition and the authors' order round their logits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """Tokens, and the probes that read them with 32 queries or as many as said."""

    queries: int = 32
    probes: int = 1
    batch: int = 64
    tokens: int = 196
    dim: int = 768

    def __str__(self) -> str:
        probes = f"{self.probes} probes of " if self.probes > 1 else ""
        return f"{self.batch}x{self.tokens}x{self.dim}, {probes}{self.queries} queries"


class ValuesFirst(EfficientProbing):
    def forward(self, tokens: Tensor) -> Tensor:
        scaled = self.queries * self.queries.shape[1] ** -0.5
        attention = (scaled @ tokens.transpose(1, 2)).softmax(-1)  # (B, M, N)
        values = self.value(tokens).unflatten(-1, (self.num_queries, -1))  # (B, N, M, D_o / M)
        return (attention[:, :, None] @ values.transpose(1, 2)).flatten(1)


class OneAfterTheOther(EfficientProbing):
    probes: int

    def forward(self, tokens: Tensor) -> Tensor:
        out = []
        parts = (x.chunk(self.probes) for x in (self.queries, self.value.weight))
        for queries, weight in zip(*parts, strict=True):
            z, _ = torch.ops.visionattn.multi_query_pool(tokens, queries)
            out.append(torch.einsum("bmd,mod->bmo", z, weight.unflatten(0, (len(queries), -1))).flatten(1))
        return torch.cat(out, -1)


class MultiHead(nn.Module):
    def __init__(self, dim: int, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(dim))
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        q = self.query.view(1, self.heads, 1, -1).expand(len(tokens), -1, -1, -1)
        return self.attend(q, k, v).flatten(1)


class MultiHeadDefinition(MultiHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v


FORMS: dict[str, type[nn.Module]] = {
    "values first": ValuesFirst,
    "EfficientProbing": EfficientProbing,
    "one after the other": OneAfterTheOther,
    "multi-head": MultiHead,
    "multi-head definition": MultiHeadDefinition,
}


def pooling(form: str, case: Case, dtype: torch.dtype, device: str) -> Problem:
    """A pooling whose queries are so large that they prefer some tokens to others."""
    torch.manual_seed(SEED)
    tokens = torch.randn(case.batch, case.tokens, case.dim)
    if form.startswith("multi-head"):
        module = FORMS[form](case.dim)
    else:
        module = FORMS[form](case.dim, case.queries * case.probes, case.dim * case.probes)
        nn.init.normal_(module.queries)
    if isinstance(module, OneAfterTheOther):
        module.probes = case.probes
    cotangent = torch.randn(case.batch, case.dim * case.probes)
    return Problem(module.to(device, dtype), [tokens.to(device, dtype)], cotangent.to(device, dtype))


class Operator(nn.Module):
    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        return torch.ops.visionattn.multi_query_pool(tokens, queries)[0]


class Definition(nn.Module):
    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        return multi_query_pool_definition(tokens, queries)[0]


class FromInt8(nn.Module):
    def forward(self, tokens: Tensor, scales: Tensor, queries: Tensor) -> Tensor:
        return torch.ops.visionattn.multi_query_pool(tokens, queries, None, scales)[0]


class ConvertedFirst(nn.Module):
    def forward(self, tokens: Tensor, scales: Tensor, queries: Tensor) -> Tensor:
        floats = tokens.to(queries.dtype).mul_(scales[..., None])
        return torch.ops.visionattn.multi_query_pool(floats, queries)[0]


class Int8Definition(nn.Module):
    def forward(self, tokens: Tensor, scales: Tensor, queries: Tensor) -> Tensor:
        return multi_query_pool_definition(tokens, queries, None, scales)[0]


def averages(module: type[nn.Module], trained: bool, case: Case, dtype: torch.dtype, device: str) -> Problem:
    """The operator's part of the pooling: the tokens' averages, with the gradient of the tokens or without."""
    torch.manual_seed(SEED)
    queries = case.queries * case.probes
    shapes = [(case.batch, case.tokens, case.dim), (queries, case.dim), (case.batch, queries, case.dim)]
    tokens, rows, cotangent = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return Problem(module(), [tokens.requires_grad_(trained), rows.requires_grad_()], cotangent)


def int8_averages(module: type[nn.Module], case: Case, dtype: torch.dtype, device: str) -> Problem:
    """The same for tokens stored in int8 with scales in float16, as in a feature store."""
    problem = averages(module, False, case, dtype, device)
    tokens, rows = problem.inputs
    scales = (tokens.abs().amax(-1) / 127).half()
    values = (tokens / scales[..., None]).round().clamp(-127, 127).to(torch.int8)
    return problem._replace(inputs=[values, scales, rows])


# Eight probes of 32 queries at once, too. A GPU is given enough to do.
CASES = {
    "cpu": [Case(8), Case(32), Case(32, probes=8)],
    "cuda": [Case(8, batch=1024), Case(32, batch=1024), Case(32, probes=8, batch=256)],
}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def block(device: str, repeats: int) -> list[dict]:
    """The pooling compared with its alternatives."""
    rows, dtype = [], DTYPE[device]
    for case in CASES[device]:
        names = ["values first", "EfficientProbing"] + ["one after the other"] * (case.probes > 1)
        values_first = partial(pooling, "values first")
        forms = {name: Implementation(partial(pooling, name), values_first) for name in names}
        if case.probes == 1:
            definition = partial(pooling, "multi-head definition")
            forms["multi-head"] = Implementation(partial(pooling, "multi-head"), definition)
        rounds = max(3, repeats // case.probes)
        rows += measure("efficient_probing", case, forms, "values first", dtype, TOLERANCES[dtype], device, rounds)
    return rows


def operator(device: str, repeats: int) -> list[dict]:
    """The operator compared with its definition."""
    rows = []
    for case in CASES[device]:
        for dtype, tolerance in TOLERANCES.items():
            forms = {
                name: Implementation(partial(averages, module, trained), partial(averages, Definition, trained))
                for trained in (False, True)
                for name, module in {
                    "definition" + ", tokens too" * trained: Definition,
                    "operator" + ", tokens too" * trained: Operator,
                }.items()
            }
            rows += measure("multi_query_pool", case, forms, "definition", dtype, tolerance, device, repeats)
    return rows


def int8(device: str, repeats: int) -> list[dict]:
    """The operator over int8 tokens, and over floats that are made of all of them first."""
    rows, dtype = [], DTYPE[device]
    for case in CASES[device]:
        forms = {
            name: Implementation(partial(int8_averages, module), partial(int8_averages, Int8Definition))
            for name, module in {"floats first": ConvertedFirst, "int8": FromInt8}.items()
        }
        rows += measure("multi_query_pool", case, forms, "floats first", dtype, TOLERANCES[dtype], device, repeats)
    return rows


PARTS = {"block": block, "operator": operator, "int8": int8}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    for part in options.parts:
        rows = [{"part": part, **row} for row in PARTS[part](options.device, options.repeats)]
        write_rows(RESULTS / "multi_query_pool.csv", rows, key=("part", "device"))


if __name__ == "__main__":
    main()
