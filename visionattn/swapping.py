"""Another mixer in the attention layers of a timm transformer: `visionattn.swap(model, "hsa", every=2)`."""

from __future__ import annotations

import fnmatch
import inspect
import math
from typing import Any

import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionattn.blocks import MinimalAttention
from visionattn.cost import Savings, count_macs, count_parameters
from visionattn.errors import InputError
from visionattn.mixers import Mixer, find_mixer

__all__ = ["Swapped", "swap"]


class TokenGrid:
    """Size of the last grid of a model's patch embedding, which later layers are not told.

    Args:
        size: (H, W), used if the embedding returns tokens (B, N, C) instead of a map (B, H, W, C).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.trained = size
        self.size = size

    def __getstate__(self) -> dict[str, Any]:
        # Symbolic sizes that an export leaves behind cannot be copied.
        return {"trained": self.trained, "size": self.trained}

    def __call__(self, embedding: nn.Module, inputs: tuple, output: Tensor) -> None:
        """A forward hook."""
        self.size = (output.shape[1], output.shape[2]) if output.ndim == 4 else self.trained


class _Mixing(TorchFunctionMode):
    """Within this context `scaled_dot_product_attention` is another function."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.mix = mix

    def __torch_function__(self, func, types, args=(), kwargs=None):
        mix = self.mix if func is F.scaled_dot_product_attention else func
        return mix(*args, **(kwargs or {}))


class Swapped(nn.Module):
    """An attention layer whose heads mix by `mixer`; its projections, norms, rotations and gates stay the same."""

    mixer: Mixer
    token_grid: TokenGrid
    num_prefix_tokens: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's forward, with another function in place of scaled dot-product attention."""

        def mix(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **unused) -> Tensor:
            grid = self.token_grid.size
            if q.shape[2] != self.num_prefix_tokens + grid[0] * grid[1] or is_causal:
                raise InputError(
                    f"A grid of {grid[0]} x {grid[1]} and {self.num_prefix_tokens} prefix tokens do not match "
                    f"{q.shape[2]} tokens, or the attention is causal: undo the swap of layers with other tokens."
                )
            if attn_mask is not None and "bias" not in self.mixer.supports:
                raise InputError(f"{self.mixer.name} does not support a bias or a mask of the logits.")
            if scale is not None:
                q = q * (scale * math.sqrt(q.shape[-1]))
            return self.mixer.core(q, k, v, grid, x, None, attn_mask)

        with _Mixing(mix):
            return super().forward(x, *args, **kwargs)


class SwappedAttention(Swapped, Attention):
    """timm's attention with another mixer."""


class SwappedAttentionRope(Swapped, AttentionRope):
    """timm's rotary attention with another mixer."""


class SwappedEvaAttention(Swapped, EvaAttention):
    """EVA's attention with another mixer."""


class SwappedBeitAttention(Swapped, BeitAttention):
    """BEiT's attention with another mixer."""


class SwappedMinimalAttention(Swapped, MinimalAttention):
    """Minimal attention with another mixer."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Attention: SwappedAttention,
    AttentionRope: SwappedAttentionRope,
    EvaAttention: SwappedEvaAttention,
    BeitAttention: SwappedBeitAttention,
    MinimalAttention: SwappedMinimalAttention,
}


def swap(model: nn.Module, mixer: str, where: str = "*", every: int = 1, **settings: Any) -> Savings:
    """Replace the mixer of attention layers of a timm transformer, in place, and return what that saves.

        model = timm.create_model("vit_small_patch16_224", pretrained=True)
        print(visionattn.swap(model, "hsa", every=2, windows=7))

    A layer stays the same object with the same parameters, names, hooks and mode. The mixer's own parameters, if any,
    are new ones below `mixer` in the layer; they are initialised so that the layer computes softmax attention if
    `MIXERS[mixer].limit` says that it can. Weight files of the model still load after the swap. Swapped layers can be
    swapped again.

    Args:
        model: A model with a `patch_embed`, whose attention is timm's `Attention`, `AttentionRope`, EVA's or BEiT's, or
            `MinimalAttention`.
        mixer: Name in `visionattn.mixers.MIXERS`; `"softmax"` undoes a swap, but for the class.
        where: Pattern of layers' names as in `model.named_modules()`, such as `"blocks.1?.attn"`.
        every: Swap every so many of the found layers, beginning with the first; the others stay: a hybrid.
        **settings: Arguments of the mixer, such as `kernel=7`. If it has a `grid_size`, the default is the model's.

    Parameters and multiply-accumulates before and after, as executed here.
        Parameters and multiply-accumulates before and after, as they are executed here.

    Raises:
        UnknownNameError: The mixer is unknown.
        InputError: The model has no such layers or no grid, the mixer cannot replace a layer's core, a setting is
            wrong, or the model does not run with the mixer. The model is then unchanged.
    """
    find_mixer(mixer)
    layers = attention_layers(model, where, every)
    grid = grid_of(model)
    size = image_size(model)
    before = count_parameters(model), count_macs(model, size)
    embedding = model.get_submodule("patch_embed")
    old = [_state(module) for module in (*layers.values(), embedding)]
    if grid not in embedding._forward_hooks.values():
        embedding.register_forward_hook(grid)
    try:
        for name, layer in layers.items():
            _convert(layer, _core(mixer, layer, name, grid.trained, settings), grid, model)
        return Savings(before[0], count_parameters(model), before[1], count_macs(model, size))
    except Exception as error:
        for state in old:
            _restore(*state)
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model does not run with the mixer {mixer!r}: {error}") from error


def _state(module: nn.Module) -> tuple[nn.Module, type, dict[str, Any], dict[str, dict]]:
    """A module with its class, its attributes, and the contents of dictionaries among them."""
    attributes = vars(module).copy()
    return module, type(module), attributes, {n: d.copy() for n, d in attributes.items() if isinstance(d, dict)}


def _restore(module: nn.Module, kind: type, attributes: dict[str, Any], contents: dict[str, dict]) -> None:
    """Undo all changes since `_state`; hook handles refer to the dictionaries, which stay the same objects."""
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)
    for name, content in contents.items():
        attributes[name].clear()
        attributes[name].update(content)


def attention_layers(model: nn.Module, where: str, every: int) -> dict[str, nn.Module]:
    """Names and attention layers that match a pattern, every so many."""
    if every < 1:
        raise InputError(f"every must be at least 1; got {every}.")
    known = {n: m for n, m in model.named_modules() if type(m) in CLASSES or isinstance(m, Swapped)}
    if not known:
        names = ", ".join(kind.__name__ for kind in CLASSES)
        raise InputError(f"{type(model).__name__} has no attention layer that swap supports ({names}).")
    found = [name for name in known if fnmatch.fnmatchcase(name, where)]
    if not found:
        raise InputError(f"No attention layer matches {where!r}; there are {', '.join(list(known)[:4])} and so on.")
    return {name: known[name] for name in found[::every]}


def grid_of(model: nn.Module) -> TokenGrid:
    """The grid that a model was built for, the same object at each call after a swap."""
    embedding: Any = getattr(model, "patch_embed", None)
    for hook in getattr(embedding, "_forward_hooks", {}).values():
        if isinstance(hook, TokenGrid):
            return hook
    size = getattr(embedding, "grid_size", None)
    if size is None:
        raise InputError(f"{type(model).__name__} has no patch_embed with a grid_size, which swap needs.")
    return TokenGrid((int(size[0]), int(size[1])))


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """Size (C, H, W) of the images that a model was built for.

    Raises:
        InputError: Its patch embedding does not tell.
    """
    embedding: Any = getattr(model, "patch_embed", None)
    size: Any = getattr(embedding, "img_size", None)
    kernels = [p for p in embedding.parameters() if p.ndim == 4] if size is not None else []
    if not kernels:
        raise InputError(
            f"{type(model).__name__} has no patch_embed with an img_size and a kernel: its image size is not known."
        )
    return (kernels[0].shape[1], size[0], size[1])


def _core(name: str, layer: nn.Module, where: str, grid: tuple[int, int], settings: dict[str, Any]) -> Mixer:
    """A mixer without projections for a layer."""
    kind = find_mixer(name)
    if not kind.swappable:
        raise InputError(f"The mixer {name!r} has its own projections: it cannot replace a layer's core.")
    accepted = inspect.signature(kind).parameters
    unknown = set(settings) - set(accepted)
    if unknown or {"dim", "num_heads", "device", "dtype"} & set(settings):
        raise InputError(f"The mixer {name!r} does not take {', '.join(sorted(unknown or settings))}.")
    if "grid_size" in accepted:
        settings = {"grid_size": grid, **settings}
    weight = next(layer.parameters())
    heads, dim = int(layer.num_heads), _width(layer)  # type: ignore[arg-type]
    if getattr(layer, "head_dim", dim // heads) * heads != dim:
        raise InputError(
            f"The heads of {where} have width {layer.head_dim}, {heads} of them: swap needs {dim} in total."
        )
    mixer = kind(dim, heads, **settings, device=weight.device, dtype=weight.dtype)
    for part in ("qkv", "q_norm", "k_norm", "proj"):
        delattr(mixer, part)
    return mixer.train(layer.training)


def _width(layer: nn.Module) -> int:
    """Channels of a layer's tokens."""
    for name in ("qkv", "q_proj"):
        projection = getattr(layer, name, None)
        if projection is not None:
            return projection.in_features
    return int(layer.dim)  # type: ignore[arg-type]


def _convert(layer: nn.Module, mixer: Mixer, grid: TokenGrid, model: nn.Module) -> None:
    """Give a layer its new class, the mixer, and the grid."""
    if getattr(getattr(layer, "attn_drop", None), "p", 0.0):
        raise InputError("Layers with dropout of attention weights cannot be swapped: build the model without it.")
    if not isinstance(layer, Swapped):
        layer.__class__ = CLASSES[type(layer)]
        layer.register_load_state_dict_pre_hook(_keep_the_start)
    prefix: Any = getattr(model, "num_prefix_tokens", 0)
    vars(layer).update(token_grid=grid, num_prefix_tokens=prefix, fused_attn=True)
    layer.mixer = mixer


def _keep_the_start(layer: Swapped, state_dict: dict, prefix: str, *unused: Any) -> None:
    """Files from before the swap have no parameters of the mixer: it keeps its own."""
    own = layer.mixer.state_dict()
    if not any(f"{prefix}mixer.{name}" in state_dict for name in own):
        state_dict.update({f"{prefix}mixer.{name}": tensor for name, tensor in own.items()})
