"""Change somebody's model in place: `visionattn.accelerate(model)`, `visionattn.insert(model, block, where)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import permutations
from typing import NamedTuple

import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn

from visionattn.blocks import HaloAttention
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError

__all__ = ["Savings", "accelerate", "insert"]


def accelerate(model: nn.Module) -> nn.Module:
    """Let every halo attention of a timm model compute with this package's operator, which gives the same numbers.

        model = timm.create_model("halonet50ts", pretrained=True)
        visionattn.accelerate(model)
        logits = model(images)

    Each `timm.layers.halo_attn.HaloAttn`, whatever its settings and wherever it stands, turns into a `HaloAttention`
    with timm's border and index. It stays the same object with the same parameters, submodules, hooks and mode:
    optimizers, tied weights, averages of weights and state dicts go on as they were, and weight files of timm load
    before and after. Outputs and gradients differ by rounding only.

    Maps that the block size does not divide, which timm refuses, are taken too. Outputs can be differentiated once, and
    not by `torch.func`; `torch.onnx.export` by itself does not know the operator.

    What holds no `HaloAttn` any more, such as a scripted or traced model, stays as it is: accelerate first. Subclasses
    of `HaloAttn` stay as well, since they may compute something else.

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
    """Give a layer our class and the settings that our class reads; what `nn.Module` keeps is not touched."""
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
    # A new object would have to be put wherever the old one is known: parents, hooks bound to it, variables of others.
    layer.__class__ = HaloAttention  # type: ignore[assignment]


class Savings(NamedTuple):
    """Parameters and multiply-accumulates (of one image) of a model before and after a change."""

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    def __str__(self) -> str:
        parameters = _difference(self.parameters_before, self.parameters_after, 1, "parameters")
        return f"{parameters}; {_difference(self.macs_before, self.macs_after, 1e6, 'M multiply-accumulates')}"


def _difference(before: int, after: int, unit: float, name: str) -> str:
    digits = 0 if unit == 1 else 2
    return (
        f"{before / unit:,.{digits}f} -> {after / unit:,.{digits}f} {name} "
        f"({(after - before) / unit:+,.{digits}f}, {(after - before) / before:+.1%})"
    )


def insert(
    model: nn.Module,
    block: Callable[[int], nn.Module],
    where: str | Iterable[str],
    mode: str = "add",
    input_size: tuple[int, int, int] | None = None,
) -> Savings:
    """Put blocks behind layers of a convolutional model, or in their place, and print what that saves.

        model = timm.create_model("mobilenetv2_100", pretrained=True)
        visionattn.insert(model, SubspaceAttention, where=["blocks.4.2", "blocks.5.2"], mode="replace")

    Everything but the named layers keeps its names and weights. A layer that a block is added to gets `.0` after its
    name and the block `.1`: load weights before. Blocks take the dtype, the device and the mode of the model.

    Args:
        model: Any model of maps, such as timm's convolutional networks.
        block: Called with the number of channels, gives a module (B, C, H, W) -> (B, C, H, W): a class of
            `visionattn.blocks`, or `functools.partial(SubspaceAttention, num_subspaces=8)`.
        where: Name or names of layers, as in `model.named_modules()`.
        mode: `"add"`: behind the layer. `"replace"`: in place of a layer whose output has the shape of its input.
        input_size: Image (C, H, W) to count with; that of `model.pretrained_cfg` if None.

    Returns:
        Parameters and multiply-accumulates before and after.

    Raises:
        InputError: There is no layer of a name (those that would do are listed), a layer to be replaced changes the
            shape, a layer gives no map, one lies in another, or the model does not run with the block. The model is
            then as it was.
    """
    if mode not in ("add", "replace"):
        raise InputError(f"mode is {mode!r}; it can be one of add, replace.")
    names = [where] if isinstance(where, str) else list(where)
    for one, other in permutations(names, 2):
        if f"{other}.".startswith(f"{one}."):
            raise InputError(f"{other!r} is or lies in {one!r}: give insert layers that are apart from each other.")
    size = input_size or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise InputError("The model does not say the size of its images: give insert an input_size, (C, H, W).")
    shapes = _shapes(model, size)
    outputs = {name: shapes[name][1] for name in names if _can_take(name, shapes, "add")}
    for name in names:
        if not _can_take(name, shapes, mode):
            raise InputError(_refusal(model, name, shapes, mode))
    before = count_parameters(model), count_macs(model, size)
    like = next(model.parameters())
    old = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in old.items():
            with torch.device(like.device):
                new = block(outputs[name][1]).to(like.dtype).train(model.training)
            _put(model, name, new if mode == "replace" else nn.Sequential(layer, new))
        savings = Savings(before[0], count_parameters(model), before[1], count_macs(model, size))
    except Exception as error:
        for name, layer in old.items():
            _put(model, name, layer)
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model does not run with this block at {', '.join(names)}: {error}") from error
    print(f"{type(model).__name__}: {savings}")
    return savings


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _shapes(model: nn.Module, size: tuple[int, int, int]) -> dict[str, tuple]:
    """Name of each module that takes one map -> shapes of its input and its output, or None where that is no map."""
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


def _can_take(name: str, shapes: dict[str, tuple], mode: str) -> bool:
    given, got = shapes.get(name, (None, None))
    return name != "" and got is not None and (mode == "add" or given == got)


def _refusal(model: nn.Module, name: str, shapes: dict[str, tuple], mode: str) -> str:
    """Why a layer cannot be taken, and which could."""
    given, got = shapes.get(name, (None, None))
    if name not in shapes:
        reason = f"There is no layer {name!r} that takes part in the model."
    elif name == "" or got is None:
        reason = f"The layer {name!r} gives no map (B, C, H, W)."
    else:
        reason = (
            f"The layer {name!r} makes {tuple(got[1:])} of {tuple(given[1:]) if given else 'what is no map'}: only one "
            "that keeps the shape can be replaced."
        )
    # Layers around convolutions are a network's blocks and stages; their parts would make a long list.
    convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    blocks = {path.rpartition(".")[0] for path in convolutions}
    candidates = [other for other in shapes if other in blocks and _can_take(other, shapes, mode)]
    return f"{reason} {mode!r} takes, among others: {', '.join(candidates) or 'none'}."
