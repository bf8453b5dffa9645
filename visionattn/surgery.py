"""Change somebody's model in place: `visionattn.accelerate(model)`."""

from __future__ import annotations

from timm.layers.halo_attn import HaloAttn
from torch import nn

from visionattn.blocks import HaloAttention

__all__ = ["accelerate"]


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
