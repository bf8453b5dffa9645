"""Modify a model in place: `visionattn.accelerate(model)`, `visionattn.insert(model, block, where)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import permutations

import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn

from visionattn.blocks import HaloAttention
from visionattn.cost import Savings, count_macs, count_parameters
from visionattn.errors import InputError

__all__ = ["Residual", "Savings", "accelerate", "insert"]

MODES = ("residual", "add", "replace")


def accelerate(model: nn.Module) -> nn.Module:
    """Let every halo attention of a timm model use this package's operator, with the same results.

        model = timm.create_model("halonet50ts", pretrained=True)
        visionattn.accelerate(model)
        logits = model(images)

    Each `timm.layers.halo_attn.HaloAttn`, with any settings and at any depth, becomes a `HaloAttention`
    with timm's border and index. It stays the same object with the same parameters, submodules, hooks and mode:
    optimizers, tied weights, weight averages and state dicts continue to work, and timm's weight files load
    before and after. Outputs and gradients differ by rounding only.

    Maps not divisible by the block size, which timm refuses, are accepted too. Second derivatives, forward mode and
    the transforms of `torch.func` use the operator's plain definition. `torch.onnx.export` alone does not support the
    operator.

    Modules without `HaloAttn` objects, such as scripted or traced models, are unchanged: accelerate first. Subclasses
    of `HaloAttn` are unchanged too, since they may compute something else.

    Args:
        model: Any module; a `HaloAttn` itself, or one that has such layers at any depth.

    Returns:
        The same model, unchanged if it has no such layer.
    """
    for module in model.modules():
        if type(module) is HaloAttn:
            _convert(module)
    return model


def _convert(layer: HaloAttn) -> None:
    """Give a layer our class and its settings; the state of `nn.Module` is not touched."""
    ours = HaloAttention(
        layer.dim_out_v,  # stands for the input width, which matters to projections only: the layer keeps its own
        num_heads=layer.num_heads,
        dim_head=layer.dim_head_qk,
        block_size=layer.block_size,
        halo_size=layer.halo_size,
        stride=layer.block_stride,  # 1 where timm averages: the layer keeps its `pool`
        scale_pos_embed=layer.scale_pos_embed,
        border="zero",
        index="timm",
        device="meta",
    )
    kept = vars(nn.Module())
    vars(layer).update({name: value for name, value in vars(ours).items() if name not in kept})
    # A new object would have to replace the old one everywhere: in parents, bound hooks, variables.
    layer.__class__ = HaloAttention  # type: ignore[assignment]


class Residual(nn.Module):
    """A block with a skip connection and a gain per channel, initialised to 0: x + gain * block(x).

    It is exactly the identity at first. The gain is trained from the first step on, the block from the second.

    Args:
        block: (B, C, H, W) -> (B, C, H, W).
        dim: Channels C.

    Shape:
        (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, block: nn.Module, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.block = block
        self.gain = nn.Parameter(torch.zeros(dim, 1, 1, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.gain * self.block(x)


def insert(
    model: nn.Module,
    block: Callable[[int], nn.Module],
    where: str | Iterable[str],
    mode: str | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Savings:
    """Insert blocks after layers of a convolutional model, or replace the layers, and return what that saves.

        model = timm.create_model("mobilenetv2_100", pretrained=True)
        visionattn.insert(model, SubspaceAttention, where=["blocks.4.2", "blocks.5.2"], mode="replace")

    Everything but the named layers keeps its names and weights. A layer with a block after it gets `.0` appended to its
    name, and the block `.1`: load weights before. Blocks get the dtype, the device and the mode of the model.

    Args:
        model: Any model of maps, such as timm's convolutional networks.
        block: Called with the number of channels, returns a module (B, C, H, W) -> (B, C, H, W): a class of
            `visionattn.blocks`, or `functools.partial(SubspaceAttention, num_subspaces=8)`.
        where: Name or names of layers, as in `model.named_modules()`.
        mode: `"residual"`: behind the layer, as x + gain * block(x) with a gain of 0 for each channel, so that the
            model computes exactly what it did until it is trained (see `Residual`). `"add"`: behind the layer, as
            block(x), which replaces the layer's output. `"replace"`: in place of a layer whose output has the shape of
            its input. None: `"add"` for gates, which multiply their input and say so by an attribute `is_gate`, such as
            `SubspaceAttention`; `"residual"` for all others, such as `HaloAttention`, which forget their input.
        input_size: Image (C, H, W) for counting; that of `model.pretrained_cfg` if None.

    Returns:
        Parameters and multiply-accumulates before and after; `print` shows them in one line.

    Raises:
        InputError: There is no layer of that name (suitable ones are listed), a replaced layer changes the
            shape, a layer returns no map, one contains another, the block changes the shape, or the model does not
            run with the block. The model is then unchanged.
    """
    if mode is not None and mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, or None; got {mode!r}.")
    names = [where] if isinstance(where, str) else list(where)
    for one, other in permutations(names, 2):
        if f"{other}.".startswith(f"{one}."):
            raise InputError(f"{other!r} is or is inside {one!r}: name layers that do not contain each other.")
    size = input_size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise InputError("The model has no image size: pass input_size, (C, H, W), to insert.")
    shapes = _shapes(model, size)
    for name in names:
        if not _can_take(name, shapes, mode):
            raise InputError(_refusal(model, name, shapes, mode))
    outputs = {name: shapes[name][1] for name in names}
    before = count_parameters(model), count_macs(model, size)
    like = next(model.parameters())
    old = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in old.items():
            with torch.device(like.device):
                new = block(outputs[name][1]).to(like.dtype).train(model.training)
            _put(model, name, _joined(layer, new, outputs[name][1], mode, like))
        _check_outputs(model, size, outputs)
        savings = Savings(before[0], count_parameters(model), before[1], count_macs(model, size))
    except Exception as error:
        for name, layer in old.items():
            _put(model, name, layer)
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model does not run with this block at {', '.join(names)}: {error}") from error
    return savings


def _joined(layer: nn.Module, block: nn.Module, dim: int, mode: str | None, like: torch.Tensor) -> nn.Module:
    if mode == "replace":
        return block
    if mode is None:
        mode = "add" if getattr(block, "is_gate", False) else "residual"
    if mode == "residual":
        block = Residual(block, dim, device=like.device, dtype=like.dtype).train(block.training)
    return nn.Sequential(layer, block)


def _check_outputs(model: nn.Module, size: tuple[int, int, int], wanted: dict[str, torch.Size]) -> None:
    """Check shapes, since a sum would silently broadcast a block's output of one channel."""
    shapes = _shapes(model, size)
    for name, shape in wanted.items():
        residual = isinstance(getattr(model.get_submodule(name), "1", None), Residual)
        got = shapes[f"{name}.1.block" if residual else name][1]
        if got != shape:
            given = "no map" if got is None else f"{tuple(got[1:])}"
            raise InputError(f"The block must keep the shape {tuple(shape[1:])} at {name}; got {given}.")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _shapes(model: nn.Module, size: tuple[int, int, int]) -> dict[str, tuple]:
    """Name of each module that takes one map -> shapes of its input and output, or None if that is not a map."""
    model = copy.deepcopy(model).to("meta").eval()
    shapes: dict[str, tuple] = {}

    def record(name: str) -> Callable:
        def hook(module, inputs, output) -> None:
            maps = [x.shape if isinstance(x, torch.Tensor) and x.ndim == 4 else None for x in (*inputs, output)]
            shapes[name] = (maps[0], maps[-1])

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        model(torch.empty(1, *size, dtype=next(model.parameters()).dtype, device="meta"))
    return shapes


def _can_take(name: str, shapes: dict[str, tuple], mode: str | None) -> bool:
    given, got = shapes.get(name, (None, None))
    return name != "" and got is not None and (mode != "replace" or given == got)


def _refusal(model: nn.Module, name: str, shapes: dict[str, tuple], mode: str | None) -> str:
    """Why a layer cannot be used, and which could."""
    given, got = shapes.get(name, (None, None))
    if name not in shapes:
        reason = f"There is no layer {name!r} that is used in the forward pass."
    elif name == "" or got is None:
        reason = f"The layer {name!r} does not return a map (B, C, H, W)."
    else:
        reason = (
            f"The layer {name!r} makes {tuple(got[1:])} of {tuple(given[1:]) if given else 'what is no map'}: only one "
            "that keeps the shape can be replaced."
        )
    # Layers around convolutions are a network's blocks and stages; listing their parts would be long.
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    blocks = {path.rpartition(".")[0] for path in convolutions}
    candidates = [other for other in shapes if other in blocks and _can_take(other, shapes, mode)]
    return (
        f"{reason} {'insert' if mode is None else repr(mode)} takes, among others: {', '.join(candidates) or 'none'}."
    )
