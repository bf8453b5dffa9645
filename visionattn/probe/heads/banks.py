"""Probing heads, and banks that stack similar heads, so that many heads train at little more than the cost of one.

A head is pooling -> batch norm without scale and shift -> linear classifier. A bank holds heads with one pooling at one
layer. The parameters of its heads are slices of the bank's: the classifiers, and the value matrices of efficient
probing, are batched matrix products, and its queries, together with those of other banks, are one call of
`multi_query_pool`. Poolings without parameters, and their batch norms, are shared by all heads of a bank and computed
once. Any other pooling has a bank per head.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
import torch.nn as nn
import torch.nn.functional as F

from visionattn.errors import InputError
from visionattn.probe.heads.poolings import Pooling, create_pooling
from visionattn.probe.heads.poolings.learned_query import PatchProbing
from visionattn.probe.heads.poolings.own_weights import Mean
from visionattn.probe.tokens.interface import Layer, Tokens, dequantize

__all__ = [
    "Bank",
    "Head",
    "HeadSpec",
    "bank_tokens",
    "create_head",
    "grid",
    "group_logits",
    "head_tokens",
    "make_banks",
]

# Elements in the averages (B, M, D) of a call of `multi_query_pool`. On CPUs, 16 MiB of float32 are below the size from
# which malloc returns memory to the system after each use; on other devices the limit bounds the memory.
_AVERAGES_ON_CPU, _AVERAGES_ELSEWHERE = 2**22, 2**28


@dataclass(frozen=True)
class HeadSpec:
    """A head to train, with its settings.

    Attributes:
        pooling: Name of the pooling, as `create_pooling` takes it, such as `"ep_32"`.
        layer: Index of the layer that it reads among those of the features.
        optimizer: `"lars"` (momentum 0.9, trust 0.001) or `"adamw"`.
        lr: Peak learning rate; for LARS it is multiplied by batch size / 256.
        weight_decay: Weight decay of matrices; biases do not decay.
        seed: Seed of the initial weights.
    """

    pooling: str
    layer: int = -1
    optimizer: str = "lars"
    lr: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = 0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf
        if self.optimizer not in ("lars", "adamw") or not sizes:
            raise InputError(
                "optimizer must be one of 'lars', 'adamw', lr a finite number above 0, and weight_decay a finite "
                f"number of at least 0; got {self}."
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a whole number from 0 to 2^63 - 1; got {self.seed}.")


def grid(
    poolings: Sequence[str],
    layers: Sequence[int] = (-1,),
    optimizers: Sequence[str] = ("lars",),
    lrs: Sequence[float] = (0.1,),
    weight_decays: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
) -> list[HeadSpec]:
    """Return every combination; seeds vary fastest."""
    return [HeadSpec(*values) for values in product(poolings, layers, optimizers, lrs, weight_decays, seeds)]


class Head(nn.Module):
    """Pooling, batch norm, classifier.

    Args:
        pooling: Pooling of the tokens to one vector.
        num_classes: Number K of classes.

    Attributes:
        tokens: Kind of the tokens that it reads, as `head_tokens` takes it.

    Shape:
        Tokens (B, N, D) of that kind -> logits (B, K).
    """

    def __init__(self, pooling: Pooling, num_classes: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.tokens = pooling.tokens
        self.norm = nn.BatchNorm1d(pooling.out_dim, eps=1e-6, momentum=0.1, affine=False)
        self.classifier = nn.Linear(pooling.out_dim, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, K)."""
        return self.classifier(self.norm(self.pooling(tokens)))


def create_head(spec: HeadSpec, layer: Layer, num_classes: int) -> Head:
    """Create a head with the initial weights of its seed, on the CPU in float32.

    Raises:
        UnknownNameError: The pooling does not exist.
        InputError: The pooling does not support this layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        head = Head(create_pooling(spec.pooling, layer.dim, layer.grid), num_classes)
    if head.pooling.tokens != "patches" and not layer.has_class:
        instead = spec.pooling.replace("ep_all", "ep") if spec.pooling.startswith("ep_all") else "gap"
        raise InputError(
            f"Pooling {spec.pooling!r} reads the class token, which layer {layer.name!r} does not have; use "
            f"{instead!r}, or any of gap and ep_M, which read the patches."
        )
    return head


def head_tokens(tokens: Tokens, kind: str) -> torch.Tensor:
    """Return the tokens that a pooling reads, (B, N, D).

    Args:
        tokens: Tokens of a layer.
        kind: `"patches"`, `"class"`, or `"all"` for the class token followed by the patches.
    """
    if kind == "patches" or tokens.class_token is None:
        return tokens.patches
    first = tokens.class_token.unsqueeze(1)
    return first if kind == "class" else torch.cat([first, tokens.patches], dim=1)


def _stack(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Move parameters and their gradients into one tensor, of which they become slices."""
    stack = torch.stack([parameter.detach() for parameter in parameters]).requires_grad_()
    stack.grad = torch.zeros_like(stack)
    for number, parameter in enumerate(parameters):
        parameter.data, parameter.grad = stack.detach()[number], stack.grad[number]
    return stack


class Bank:
    """Heads of one pooling at one layer (see the module).

    Args:
        heads: Heads on one device and in one dtype. Their parameters become slices of the bank's.

    Attributes:
        kind: Kind of the tokens that they read.
        queries: All queries (H M, D) of efficient probing; None for other poolings.
        takes_int8: Whether tokens can stay in int8, as for efficient probing and the mean, which only average tokens.
        parameters: Stacked parameters that receive gradients.
    """

    def __init__(self, heads: list[Head]) -> None:
        self.heads = heads
        self.pooling = heads[0].pooling
        self.kind = self.pooling.tokens
        self.weight = _stack([head.classifier.weight for head in heads])  # (H, K, O)
        self.bias = _stack([head.classifier.bias for head in heads])  # (H, K)
        self.parameters = [self.weight, self.bias]
        self.queries = None
        if isinstance(self.pooling, PatchProbing):
            poolings: list = [head.pooling for head in heads]
            queries = _stack([pooling.queries for pooling in poolings])  # (H, M, D)
            self.value = _stack([pooling.value.weight for pooling in poolings])  # (H, O, D)
            self.parameters += [queries, self.value]
            self.queries = queries
        self.takes_int8 = self.queries is not None or isinstance(self.pooling, Mean)
        # These differ between heads, and so do their batch norms.
        self.vectors = len(heads) if self.queries is not None else 1
        self._give_norms(self.vectors)

    def _give_norms(self, count: int) -> None:
        """Stack `count` batch norms, one per head or one for all, in one tensor."""
        norms: list = [head.norm for head in self.heads]
        self.running = [
            torch.stack([getattr(norm, name) for norm in norms[:count]]) for name in ("running_mean", "running_var")
        ]
        for number, norm in enumerate(norms):
            norm.running_mean, norm.running_var = (x[number % count] for x in self.running)

    def load(self, weights: Sequence[dict[str, torch.Tensor]]) -> None:
        """Load weights of different epochs for evaluation, each head with its own batch norm."""
        self._give_norms(len(self.heads))
        for head, own in zip(self.heads, weights, strict=True):
            head.load_state_dict(own)

    def train(self, mode: bool) -> None:
        """Switch to training, or to evaluation."""
        self.training = mode
        for head in self.heads:
            head.train(mode)

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        torch._foreach_zero_([x.grad for x in self.parameters if x.grad is not None])
        if self.queries is None:
            self.pooling.zero_grad()

    def project(self, averages: torch.Tensor) -> torch.Tensor:
        """Values of efficient probing from the averages of the tokens: (B, H M, D) -> (B, H O)."""
        weight = self.value.reshape(averages.shape[1], -1, averages.shape[2])  # (H M, O / M, D)
        return torch.bmm(averages.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).flatten(1)

    def classify(self, vectors: torch.Tensor) -> torch.Tensor:
        """Logits of the pooled vectors: (B, H O), or (B, O) if the heads share them -> (H, B, K)."""
        norms = len(self.running[0])
        if norms > self.vectors:
            vectors = vectors.repeat(1, norms)
        mean, variance = (x.view(-1) for x in self.running)
        x = F.batch_norm(vectors, mean, variance, training=self.training, momentum=0.1, eps=1e-6)
        if norms == 1:
            return (
                F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
                .unflatten(1, self.bias.shape)
                .transpose(0, 1)
            )
        x = x.unflatten(1, (norms, -1)).transpose(0, 1)  # (H, B, O)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


def make_banks(
    heads: list[Head], specs: Sequence[HeadSpec], batch_size: int
) -> list[tuple[int, list[Bank], list[int]]]:
    """Assign heads to banks, and banks to groups whose queries are computed in one call.

    Args:
        heads: Heads on one device and in one dtype.
        specs: Their settings.
        batch_size: Images per batch.

    Returns:
        For each group: layer, banks, and the indices of their heads in the order of the banks.
    """

    def alike(number: int) -> tuple:
        pooling = heads[number].pooling
        probing = isinstance(pooling, PatchProbing)
        apart = number if not probing and any(True for _ in pooling.parameters()) else -1
        return specs[number].layer, probing, pooling.tokens, specs[number].pooling, apart

    def pieces() -> Iterator[tuple[tuple, int, list[int]]]:
        """Heads of a bank, and the number of elements of their averages."""
        for key, numbers in groupby(sorted(range(len(heads)), key=alike), key=alike):
            members = list(numbers)
            pooling = heads[members[0]].pooling
            if not isinstance(pooling, PatchProbing):
                yield (*key, "alone"), 0, members
                continue
            one = batch_size * pooling.queries.numel()
            width = max(1, limit // one)
            for first in range(0, len(members), width):
                part = members[first : first + width]
                yield key[:3], one * len(part), part

    on_cpu = heads[0].classifier.weight.device.type == "cpu"
    limit = _AVERAGES_ON_CPU if on_cpu else _AVERAGES_ELSEWHERE
    groups: list[tuple[int, list[Bank], list[int]]] = []
    open_key, room = None, 0
    for key, size, numbers in pieces():
        if key != open_key or size > room:
            groups.append((key[0], [], []))
            open_key, room = key, limit
        groups[-1][1].append(Bank([heads[number] for number in numbers]))
        groups[-1][2].extend(numbers)
        room -= size
    return groups


def bank_tokens(
    bank: Bank, tokens: Tokens, scales: Tokens | None, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tokens that a bank reads, (B, N, D), on a device.

    Args:
        bank: A bank of a group; the other banks of the group read the same tokens.
        tokens: Tokens of the bank's layer.
        scales: Scales of int8 tokens, from `Features.stored_batches`.
        device: Device of the heads.
        dtype: Data type of the heads.

    Returns:
        Tokens in that dtype and None, or, if the bank supports it, int8 tokens and their scales (B, N).
    """
    x = head_tokens(tokens, bank.kind).to(device)
    if scales is None:
        return x.to(dtype), None
    by = head_tokens(scales, bank.kind).to(device)
    return (x, by) if bank.takes_int8 else (dequantize(x, by).to(dtype), None)


def group_logits(banks: list[Bank], tokens: torch.Tensor, scales: torch.Tensor | None) -> list[torch.Tensor]:
    """Logits of the heads of each bank of a group, (H, B, K).

    Args:
        banks: A group from `make_banks`.
        tokens: Tokens that they read, (B, N, D).
        scales: Scales of int8 tokens, (B, N); None for other tokens.
    """
    pool = torch.ops.visionattn.multi_query_pool
    queries = [bank.queries.flatten(0, 1) for bank in banks if bank.queries is not None]
    if not queries:
        if scales is not None:
            # A query of zeros weights all tokens equally: the result is their mean, (B, 1, D).
            tokens, _ = pool(tokens, banks[0].weight.new_zeros(1, tokens.shape[2]), None, scales)
        return [bank.classify(bank.pooling(tokens)) for bank in banks]
    averages, _ = pool(tokens, torch.cat(queries), None, scales)  # (B, sum of H M, D)
    parts = averages.split([len(rows) for rows in queries], dim=1) if len(queries) > 1 else [averages]
    return [bank.classify(bank.project(part)) for bank, part in zip(banks, parts, strict=True)]
