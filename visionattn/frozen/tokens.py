"""Fewer tokens in the later blocks of a frozen transformer: `visionattn.prune_tokens(model, 0.5, at=4)`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionattn.cost import Savings, count_macs, count_parameters
from visionattn.errors import InputError, shorten
from visionattn.frozen.scores import dither_order, greedy, kept_count, merge, nearest_kept, sensitivity, top
from visionattn.swapping import TokenGrid, grid_of, image_size

__all__ = ["SCORES", "prune_tokens"]

SCORES = ("merge", "grid", "received", "class", "std", "norm", "diversity", "sensitivity", "random")
DIRECTIONS = 16
_OF_ATTENTION = ("received", "class")


class _Capture(TorchFunctionMode):
    """A mode that keeps the queries and keys of the last `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor, Tensor | None, float | None] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self.seen = (named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
        return func(*args, **kwargs)


class _Cut:
    """State shared by the hooks of a model: how many tokens stay, how they are chosen, and the last choice."""

    def __init__(self, share: tuple[int, int], score: str, grid: TokenGrid, prefix: int, width: int) -> None:
        self.share, self.score, self.grid, self.prefix = share, score, grid, prefix
        generator = torch.Generator().manual_seed(0)
        self.directions = F.normalize(torch.randn(DIRECTIONS, width, generator=generator), dim=1)
        self.capture = _Capture()
        self.kept: Any = None
        self.owner: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and saved files of the model must not contain the state of the last image.
        return {**vars(self), "capture": _Capture(), "kept": None, "owner": None}

    def open(self, block: nn.Module, inputs: tuple) -> None:
        """Pre-hook of the block before the cut: start to record its attention."""
        self.capture = _Capture()
        self.capture.__enter__()

    def close(self, block: nn.Module, inputs: tuple, output: Any) -> None:
        """Hook of the same block, also called after an error: stop to record."""
        self.capture.__exit__(None, None, None)

    def choose(self, block: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict]:
        """Pre-hook of the first block after the cut: (B, P + N, C) -> (B, P + k, C)."""
        x = self._check(inputs, options)
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        height, width = self.grid.size
        if patches.shape[1] != height * width:
            raise InputError(f"{patches.shape[1]} patch tokens do not match the grid of {height} x {width}.")
        if self.score == "merge":
            patches, self.owner = merge(patches, self.share)
            index = torch.arange(self.owner.shape[1], device=x.device).expand_as(self.owner)
            # It does not matter which token of a group is written last: they are equal from here on.
            self.kept = torch.zeros_like(self.owner[:, : patches.shape[1]]).scatter(1, self.owner, index)
        else:
            self.kept = self._select(block, patches, kept_count(patches.shape[1], self.share))
            self.owner = nearest_kept(self.kept, height, width)
            patches = _gather(patches, self.kept)
        return (torch.cat([prefix, patches], dim=1),), {}

    def shrink(self, block: nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict]:
        """Pre-hook of the following blocks: (B, P + N, C) -> (B, P + k, C)."""
        x = self._check(inputs, options)
        return (torch.cat([x[:, : self.prefix], _gather(x[:, self.prefix :], self.kept)], dim=1),), {}

    def fill(self, block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Hook of all blocks after the cut: (B, P + k, C) -> (B, P + N, C), each token from its representative."""
        return torch.cat([output[:, : self.prefix], _gather(output[:, self.prefix :], self.owner)], dim=1)

    def _check(self, inputs: tuple, options: dict[str, Any]) -> Tensor:
        others = [*inputs[1:], *options.values()]
        if len(inputs) < 1 or any(isinstance(other, Tensor) or other is True for other in others):
            raise InputError("Its blocks take masks or positions in addition to the tokens, which cannot be pruned.")
        return inputs[0]

    def _select(self, block: Any, x: Tensor, count: int) -> Tensor:
        """Indices of the patch tokens (B, N, C) that stay, (B, count)."""
        if self.score == "diversity":
            return greedy(torch.ones_like(x[..., 0]), x, count).sort(dim=1).values
        if self.score == "sensitivity":

            def function(tokens: Tensor) -> Tensor:
                return block.mlp(block.norm2(tokens))

            scores = sensitivity(function, x, self.directions)
            return greedy(scores, function(x), count).sort(dim=1).values
        return top(self._scores(x), count)

    def _scores(self, x: Tensor) -> Tensor:
        if self.score in _OF_ATTENTION:
            return self._attention()
        if self.score == "std":
            return 1 / x.std(dim=2).clamp_min(1e-12)
        if self.score == "norm":
            return x.norm(dim=2)
        if self.score == "grid":
            return dither_order(*self.grid.size, x.device).expand(x.shape[0], -1)
        # Pseudo-random numbers that depend on the image: unlike a generator, they can be exported.
        index = torch.arange(x.shape[1], device=x.device)
        noise = torch.sin((index + 1) * 12.9898 + x.float().mean(dim=(1, 2))[:, None] * 7823.3) * 43758.5453
        return noise - noise.floor()

    def _attention(self) -> Tensor:
        """Attention that patches receive in the block before the cut, (B, N), mean over heads."""
        if self.capture.seen is None:
            raise InputError(
                "The block before the cut does not call scaled_dot_product_attention, for example because of "
                "fused_attn=False: choose a score that does not read attention."
            )
        q, k, bias, scale = self.capture.seen
        self.capture.seen = None
        if self.score == "class":
            q = q[:, :, :1]
            bias = bias[..., :1, :] if bias is not None and bias.shape[-2] > 1 else bias
        logits = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if bias is not None:
            logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
        return logits.softmax(dim=-1).mean(dim=(1, 2))[:, self.prefix :]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (B, N, C) at indices (B, M) -> (B, M, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def prune_tokens(model: nn.Module, keep: float, at: int | None = None, score: str = "merge") -> Savings:
    """Run the later blocks of a transformer on a share of the patch tokens, in place and without training.

        model = timm.create_model("vit_small_patch16_224", pretrained=True)
        print(visionattn.prune_tokens(model, 0.5, at=4))
        visionattn.export(model, "half.onnx")

    Prefix tokens (class, registers) always stay. Each block returns all tokens: a token that is not computed is copied
    from the nearest kept token of the grid, or from the token that it was merged into, so that heads, intermediate
    features and dense tasks see the full grid. Parameters and their names do not change; a second call replaces the cut
    of the first one.

    In this package's measurements merging loses least, and a fixed grid nearly as little; no importance score beat
    these two. See the page on frozen backbones.

    Args:
        model: A transformer with a `patch_embed` and `blocks` that take only the tokens, such as timm's
            `VisionTransformer` (DeiT, DINOv2, CLIP).
        keep: Share of the patch tokens that stay, above 0; 1 removes the cut.
        at: Index of the first block with fewer tokens; None: the first quarter of the blocks keeps all.
        score: `"merge"`; `"grid"` and `"random"`, the controls; `"class"` and `"received"`, attention of the class
            token, or of all tokens, in the previous block; `"norm"` and `"std"`, the norm and the inverse standard
            deviation; `"diversity"`, tokens far from each other; `"sensitivity"`, sensitivity of the block's MLP with
            diversity. The last two take one step per kept token, so that they can be exported only at a fixed image
            size.

    Returns:
        Parameters, which do not change, and multiply-accumulates per image before and after.

    Raises:
        InputError: The model has no such blocks or no class token, or an argument is out of range. The model is then
            unchanged.
    """
    blocks = _blocks(model)
    at = max(1, len(blocks) // 4) if at is None else at
    _check_arguments(model, keep, at, score, len(blocks))
    size = image_size(model)
    grid = grid_of(model)
    embedding = model.get_submodule("patch_embed")
    old = [(module, _hooks(module)) for module in (*blocks, embedding)]
    _remove(blocks)
    before = count_parameters(model), count_macs(model, size)
    if keep == 1:
        return Savings(before[0], before[0], before[1], before[1])
    try:
        if grid not in embedding._forward_hooks.values():
            embedding.register_forward_hook(grid)
        share = Fraction(keep).limit_denominator(1000)
        _hook(blocks, at, _Cut((share.numerator, share.denominator), score, grid, _prefix(model), _width(model)))
        return Savings(before[0], before[0], before[1], count_macs(model, size))
    except Exception as error:
        for module, hooks in old:
            _restore(module, hooks)
        if isinstance(error, InputError):
            raise
        raise InputError(f"{type(model).__name__} does not run with fewer tokens: {shorten(error)}") from error


def _blocks(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise InputError(f"{type(model).__name__} has no blocks; prune_tokens requires a transformer like timm's ViT.")
    return list(blocks)


def _check_arguments(model: nn.Module, keep: float, at: int, score: str, count: int) -> None:
    if score not in SCORES:
        raise InputError(f"score must be one of {', '.join(map(repr, SCORES))}; got {shorten(score)!r}.")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 1e-3 <= keep <= 1:
        raise InputError(f"keep must be a share of the tokens, above 0 and at most 1; got {shorten(keep)}.")
    least = 1 if score in _OF_ATTENTION else 0
    if isinstance(at, bool) or not isinstance(at, int) or not least <= at < count:
        raise InputError(f"at must be the index of a block, from {least} to {count - 1}; got {shorten(at)}.")
    if score == "class" and not (_prefix(model) and getattr(model, "cls_token", None) is not None):
        raise InputError(f"{type(model).__name__} has no class token: choose another score.")
    if getattr(model, "rope", None) is not None or getattr(model, "rel_pos_bias", None) is not None:
        raise InputError(
            f"The blocks of {type(model).__name__} take positions in addition to the tokens, which cannot be pruned."
        )


def _prefix(model: nn.Module) -> int:
    prefix: Any = getattr(model, "num_prefix_tokens", 0)
    return prefix


def _width(model: nn.Module) -> int:
    width: Any = getattr(model, "embed_dim", 0)
    return width


def _hook(blocks: list[nn.Module], at: int, cut: _Cut) -> None:
    if cut.score in _OF_ATTENTION:
        blocks[at - 1].register_forward_pre_hook(cut.open)
        blocks[at - 1].register_forward_hook(cut.close, always_call=True)
    for number, block in enumerate(blocks[at:]):
        block.register_forward_pre_hook(cut.shrink if number else cut.choose, with_kwargs=True)
        block.register_forward_hook(cut.fill)


_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_always_called")


def _hooks(module: nn.Module) -> dict[str, dict]:
    return {name: getattr(module, name).copy() for name in _HOOKS}


def _restore(module: nn.Module, hooks: dict[str, dict]) -> None:
    for name, content in hooks.items():
        kept = getattr(module, name)
        kept.clear()
        kept.update(content)


def _remove(blocks: list[nn.Module]) -> None:
    """Remove the hooks of an earlier cut."""
    for block in blocks:
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(block, name)
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Cut)]:
                del hooks[key]
                for other in _HOOKS[1::2]:
                    getattr(block, other).pop(key, None)
