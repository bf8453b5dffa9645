"""timm's Vision Transformer with a mixer of `visionattn.mixers` instead of attention.

    timm.create_model("va_vit_tiny_patch16_224", mixer="agent")
    timm.create_model("va_vit_nano_patch4_32", mixer="hsa", mixer_every=2, mixer_args={"windows": 4})

Parameters have timm's names, so that weight files of timm's models of the same shape load.

| name | channels | blocks | heads | patches |
|---|---|---|---|---|
| `va_vit_tiny_patch16_224` | 192 | 12 | 3 | 14 x 14 of 16 x 16 pixels |
| `va_vit_micro_patch4_32` | 96 | 8 | 3 | 8 x 8 of 4 x 4 pixels |
| `va_vit_nano_patch4_32` | 64 | 6 | 4 | 8 x 8 of 4 x 4 pixels |
| `va_vit_nano_patch7_28` | 64 | 6 | 4 | 4 x 4 of 7 x 7 pixels, one channel |
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from visionattn.models.minimal_vit import MICRO, NANO, TINY, cifar_cfg, imagenet_cfg, mnist_cfg
from visionattn.swapping import swap

__all__ = ["MixerVisionTransformer"]


class MixerVisionTransformer(VisionTransformer):
    """timm's Vision Transformer after `visionattn.swap`.

    Args:
        mixer: Name in `visionattn.mixers.MIXERS`.
        mixer_every: Use the mixer in every n-th block, starting with the first; the others keep softmax attention.
        mixer_args: Arguments of the mixer.
        **kwargs: Arguments of timm's `VisionTransformer`.

    Shape:
        (B, C, H, W) -> (B, num_classes).

    Raises:
        UnknownNameError: There is no such mixer.
        InputError: The mixer cannot be used in the network, or one of its arguments is invalid.
    """

    task = "classify"

    def __init__(
        self, *, mixer: str = "softmax", mixer_every: int = 1, mixer_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if mixer != "softmax":
            swap(self, mixer, every=mixer_every, **(mixer_args or {}))


_CFG = {
    "fixed_input_size": True,
    "paper_ids": "arXiv:2010.11929",
    "paper_name": "An Image is Worth 16x16 Words",
}
default_cfgs = generate_default_cfgs(
    {
        "va_vit_tiny_patch16_224.untrained": imagenet_cfg(**_CFG),
        "va_vit_micro_patch4_32.untrained": cifar_cfg(**_CFG),
        "va_vit_nano_patch4_32.untrained": cifar_cfg(**_CFG),
        "va_vit_nano_patch7_28.untrained": mnist_cfg(**_CFG),
    }
)


def _vit(name: str, pretrained: bool, settings: dict[str, Any], kwargs: dict[str, Any]) -> MixerVisionTransformer:
    return build_model_with_cfg(
        MixerVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**settings, **kwargs},
    )


@register_model
def va_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MixerVisionTransformer:
    """ViT-tiny; loads timm's `vit_tiny_patch16_224` weights."""
    return _vit("va_vit_tiny_patch16_224", pretrained, TINY, kwargs)


@register_model
def va_vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> MixerVisionTransformer:
    """ViT of width 96 and 8 blocks for 32 x 32 colour images."""
    return _vit("va_vit_micro_patch4_32", pretrained, {"img_size": 32, "patch_size": 4, **MICRO}, kwargs)


@register_model
def va_vit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> MixerVisionTransformer:
    """ViT of width 64 and 6 blocks for 32 x 32 colour images."""
    return _vit("va_vit_nano_patch4_32", pretrained, {"img_size": 32, "patch_size": 4, **NANO}, kwargs)


@register_model
def va_vit_nano_patch7_28(pretrained: bool = False, **kwargs: Any) -> MixerVisionTransformer:
    """ViT of width 64 and 6 blocks for 28 x 28 grey digits."""
    return _vit("va_vit_nano_patch7_28", pretrained, {"img_size": 28, "patch_size": 7, **NANO}, kwargs)
