"""Minimal vision transformers: ViTs whose blocks leave out projections or MLPs.

The network is timm's `VisionTransformer` (class token, learned positions, pre-norm blocks, layer norm eps 1e-6) with
`MinimalBlock`s. The baseline has the parameters and the state-dict keys of timm's `vit_tiny_patch16_224`, so that its
published weights load. Every variant accepts any image size: positions are resampled and the image is padded at the
right and bottom to whole patches.

`va_minimal_vit_micro_patch4_32_ep` reads out frozen features by efficient probing (`global_pool="ep"`). Its weight file
holds the read-out only; the backbone is that of `va_minimal_vit_micro_patch4_32`. For the tag `tuned_cifar10`, all of
it was trained further, with labels.

Variants at tiny scale (C = 192, 12 blocks, 3 heads, 224 x 224, 1000 classes; parameters counted, the first equals
timm's vit_tiny):

    suffix               similarity   heads   values      MLP   parameters
    (none)               pair         3       projected   yes   5,717,416
    _shared              shared       3       projected   yes   5,272,744
    _collapsed           collapsed    1       projected   yes   5,272,744
    _novalue             pair         3       identity    yes   4,828,072
    _shaped              pair         3       shaped      yes   4,828,180
    _collapsed_novalue   collapsed    1       identity    yes   4,383,400
    _nomlp               pair         3       projected   no    2,162,344
    _shared_nomlp        shared       3       projected   no    1,717,672
    _symmetric_nomlp     symmetric    1       projected   no    1,495,336
    _novalue_nomlp       pair         3       identity    no    1,273,000
    _minimum             collapsed    1       identity    no      828,328
    _symmetric_minimum   symmetric    1       identity    no      605,992

Sources: arXiv 2410.13732, arXiv 2311.01906 (shaped); the equations of the block are in `visionattn.blocks.minimal`.
"""

from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model, vision_transformer
from timm.models.vision_transformer import VisionTransformer

from visionattn.blocks.efficient_probing import EfficientProbing
from visionattn.blocks.minimal import MinimalBlock
from visionattn.weights import SHIPPED
from visionattn.weights.minimal_vit import adapt

__all__ = ["VARIANTS", "MinimalVisionTransformer"]


def _resize_matrix(new: int, old: int) -> torch.Tensor:
    """Antialiased cubic interpolation (a = -0.5) of `old` samples to `new`: (new, old), the identity where equal."""
    scale = torch.full((1,), float(old)) / new
    width = scale.clamp(min=1.0)
    centre = (torch.arange(new) + 0.5) * scale
    distance = ((torch.arange(old) + 0.5 - centre[:, None]) / width).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, far) * (distance < 2)
    return weight / weight.sum(dim=1, keepdim=True)


@torch.fx.wrap
def resize_positions(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resample a grid of positions (h, w, C) to (height, width, C).

    Two small matrix products equal `F.interpolate(mode="bicubic", antialias=True)`; unlike it they are deterministic in
    the backward pass on a GPU, and, with no branch on sizes, they export with dynamic height and width.
    """
    rows = _resize_matrix(height, table.shape[0]).to(table.device, table.dtype)
    columns = _resize_matrix(width, table.shape[1]).to(table.device, table.dtype)
    return columns @ (rows @ table.flatten(1)).unflatten(1, (table.shape[1], -1))


class MinimalVisionTransformer(VisionTransformer):
    """Vision transformer built from `MinimalBlock`s.

    Args:
        img_size: Image size that the position table is made for; other sizes resample it.
        patch_size: Side of a patch in pixels.
        in_chans: Image channels.
        num_classes: Classes; 0 for features.
        global_pool: Read-out: `"token"` (class token), `"avg"` (mean of the patches), `"map"` (attention with a learned
            query and an MLP), `"ep"` (efficient probing of the patches with 32 queries, for C divisible by 32) or `""`
            (all tokens).
        embed_dim: Channels C.
        depth: Number of blocks.
        num_heads: Heads of each block.
        similarity: See `MinimalAttention`.
        values: See `MinimalAttention`.
        mlp_ratio: Hidden width of the MLPs as a multiple of C; 0 leaves them out.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), any H and W.
    """

    task = "classify"
    size_multiple = 1
    size_minimum = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        similarity: str = "pair",
        values: str = "projected",
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        def block(
            dim: int, num_heads: int, mlp_ratio: float, drop_path: float, device, dtype, **_: Any
        ) -> MinimalBlock:
            # timm passes every option of its own blocks; a minimal block has only these.
            return MinimalBlock(dim, num_heads, similarity, values, mlp_ratio, drop_path, device=device, dtype=dtype)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="token" if global_pool == "ep" else global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            weight_init="jax",  # Xavier; timm's default of 0.02 is tuned to width 768 and too small for narrow networks
            block_fn=block,
            device=device,
            dtype=dtype,
        )
        if global_pool == "ep":
            self._probe()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the read-out if `global_pool` is given."""
        if global_pool == "ep" and not isinstance(self.attn_pool, EfficientProbing):
            self._probe()
        super().reset_classifier(num_classes, None if global_pool == "ep" else global_pool)

    def _probe(self) -> None:
        network: Any = self  # timm's attributes are typed for its own poolings
        table = self.pos_embed
        network.attn_pool = EfficientProbing(self.embed_dim, device=table.device, dtype=table.dtype)
        network.global_pool = "ep"

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Prepend the class token and add positions: (B, h, w, C) -> (B, 1 + h w, C)."""
        grid = self.pos_embed[0, 1:].unflatten(0, self.patch_embed.grid_size)
        grid = resize_positions(grid, x.shape[1], x.shape[2]).flatten(0, 1)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return self.pos_drop(torch.cat([token, x.flatten(1, 2) + grid], dim=1))

    # timm's own two methods also take attention masks, which a minimal block does not have.
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Tokens after the last norm: (B, in_chans, H, W) -> (B, 1 + h w, C)."""
        x = self._pos_embed(self.patch_embed(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Changes of each variant to the baseline.
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "shared": {"similarity": "shared"},
    "collapsed": {"similarity": "collapsed", "num_heads": 1},
    "novalue": {"values": "identity"},
    "shaped": {"values": "shaped"},
    "collapsed_novalue": {"similarity": "collapsed", "num_heads": 1, "values": "identity"},
    "nomlp": {"mlp_ratio": 0},
    "shared_nomlp": {"similarity": "shared", "mlp_ratio": 0},
    "symmetric_nomlp": {"similarity": "symmetric", "num_heads": 1, "mlp_ratio": 0},
    "novalue_nomlp": {"values": "identity", "mlp_ratio": 0},
    "minimum": {"similarity": "collapsed", "num_heads": 1, "values": "identity", "mlp_ratio": 0},
    "symmetric_minimum": {"similarity": "symmetric", "num_heads": 1, "values": "identity", "mlp_ratio": 0},
}

NANO = {"embed_dim": 64, "depth": 6, "num_heads": 4}
MICRO = {"embed_dim": 96, "depth": 8, "num_heads": 3}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2410.13732",
        "paper_name": "Reducing the Transformer Architecture to a Minimum",
        "license": "apache-2.0",
        **kwargs,
    }


mnist_cfg = partial(imagenet_cfg, input_size=(1, 28, 28), num_classes=10, crop_pct=1.0, mean=(0.1307,), std=(0.3081,))
cifar_cfg = partial(
    imagenet_cfg,
    input_size=(3, 32, 32),
    num_classes=10,
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

default_cfgs = generate_default_cfgs(
    {
        **{
            "va_minimal_vit_tiny_patch16_224"
            + ("" if name == "baseline" else f"_{name}")
            + ".untrained": imagenet_cfg()
            for name in VARIANTS
        },
        "va_minimal_vit_small_patch16_224.untrained": imagenet_cfg(),
        "va_minimal_vit_small_patch16_224_minimum.untrained": imagenet_cfg(),
        "va_minimal_vit_nano_patch7_28.untrained": mnist_cfg(),
        "va_minimal_vit_nano_patch7_28_minimum.untrained": mnist_cfg(),
        "va_minimal_vit_nano_patch4_32.untrained": cifar_cfg(),
        "va_minimal_vit_nano_patch4_32_minimum.untrained": cifar_cfg(),
        "va_minimal_vit_micro_patch4_32.masked_cifar10": cifar_cfg(
            num_classes=0, file=str(SHIPPED / "va_minimal_vit_micro_patch4_32.safetensors")
        ),
        "va_minimal_vit_micro_patch4_32_ep.probed_cifar10": cifar_cfg(
            file=str(SHIPPED / "va_minimal_vit_micro_patch4_32_ep.safetensors")
        ),
        "va_minimal_vit_micro_patch4_32_ep.tuned_cifar10": cifar_cfg(
            file=str(SHIPPED / "va_minimal_vit_micro_patch4_32_ep.tuned_cifar10.safetensors")
        ),
    }
)


def checkpoint_filter_fn(state: dict[str, torch.Tensor], model: MinimalVisionTransformer) -> dict[str, torch.Tensor]:
    """Convert weights to the model's layout, as timm does; a read-out alone gets its backbone."""
    return vision_transformer.checkpoint_filter_fn(adapt(state, model.state_dict()), model)


def _minimal_vit(name: str, pretrained: bool, *settings: dict[str, Any]) -> MinimalVisionTransformer:
    """Build a network from settings; later ones override earlier ones."""
    model_args: dict[str, Any] = {}
    for setting in settings:
        model_args.update(setting)
    return build_model_with_cfg(
        MinimalVisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **model_args,
    )


@register_model
def va_minimal_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny; loads timm's `vit_tiny_patch16_224` weights."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224", pretrained, TINY, kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_shared(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny with W_K = W_Q."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224_shared", pretrained, TINY, VARIANTS["shared"], kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_collapsed(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny with one W_QK, one head."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224_collapsed", pretrained, TINY, VARIANTS["collapsed"], kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_novalue(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny without W_V and W_O: heads average slices of the channels."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224_novalue", pretrained, TINY, VARIANTS["novalue"], kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_shaped(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny with shaped attention (arXiv 2311.01906)."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224_shaped", pretrained, TINY, VARIANTS["shaped"], kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_collapsed_novalue(
    pretrained: bool = False, **kwargs: Any
) -> MinimalVisionTransformer:
    """ViT-tiny with one W_QK and no values."""
    return _minimal_vit(
        "va_minimal_vit_tiny_patch16_224_collapsed_novalue", pretrained, TINY, VARIANTS["collapsed_novalue"], kwargs
    )


@register_model
def va_minimal_vit_tiny_patch16_224_nomlp(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny without MLPs."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224_nomlp", pretrained, TINY, VARIANTS["nomlp"], kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_shared_nomlp(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny with W_K = W_Q and no MLPs: the paper's best."""
    return _minimal_vit(
        "va_minimal_vit_tiny_patch16_224_shared_nomlp", pretrained, TINY, VARIANTS["shared_nomlp"], kwargs
    )


@register_model
def va_minimal_vit_tiny_patch16_224_symmetric_nomlp(
    pretrained: bool = False, **kwargs: Any
) -> MinimalVisionTransformer:
    """ViT-tiny with similarity T T^T and no MLPs."""
    return _minimal_vit(
        "va_minimal_vit_tiny_patch16_224_symmetric_nomlp", pretrained, TINY, VARIANTS["symmetric_nomlp"], kwargs
    )


@register_model
def va_minimal_vit_tiny_patch16_224_novalue_nomlp(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-tiny without values and MLPs."""
    return _minimal_vit(
        "va_minimal_vit_tiny_patch16_224_novalue_nomlp", pretrained, TINY, VARIANTS["novalue_nomlp"], kwargs
    )


@register_model
def va_minimal_vit_tiny_patch16_224_minimum(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """The paper's minimum: one matrix W_QK per block."""
    return _minimal_vit("va_minimal_vit_tiny_patch16_224_minimum", pretrained, TINY, VARIANTS["minimum"], kwargs)


@register_model
def va_minimal_vit_tiny_patch16_224_symmetric_minimum(
    pretrained: bool = False, **kwargs: Any
) -> MinimalVisionTransformer:
    """Half of the minimum: one triangular matrix T per block."""
    return _minimal_vit(
        "va_minimal_vit_tiny_patch16_224_symmetric_minimum", pretrained, TINY, VARIANTS["symmetric_minimum"], kwargs
    )


@register_model
def va_minimal_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-small."""
    return _minimal_vit("va_minimal_vit_small_patch16_224", pretrained, SMALL, kwargs)


@register_model
def va_minimal_vit_small_patch16_224_minimum(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT-small, the paper's minimum."""
    return _minimal_vit("va_minimal_vit_small_patch16_224_minimum", pretrained, SMALL, VARIANTS["minimum"], kwargs)


@register_model
def va_minimal_vit_nano_patch7_28(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT of width 64 and 6 blocks for 28 x 28 grey digits."""
    return _minimal_vit("va_minimal_vit_nano_patch7_28", pretrained, NANO, {"img_size": 28, "patch_size": 7}, kwargs)


@register_model
def va_minimal_vit_nano_patch7_28_minimum(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """The paper's minimum of width 64 and 6 blocks for 28 x 28 grey digits."""
    return _minimal_vit(
        "va_minimal_vit_nano_patch7_28_minimum",
        pretrained,
        NANO,
        {"img_size": 28, "patch_size": 7},
        VARIANTS["minimum"],
        kwargs,
    )


@register_model
def va_minimal_vit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT of width 64 and 6 blocks for 32 x 32 colour images."""
    return _minimal_vit("va_minimal_vit_nano_patch4_32", pretrained, NANO, {"img_size": 32, "patch_size": 4}, kwargs)


@register_model
def va_minimal_vit_nano_patch4_32_minimum(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """The paper's minimum of width 64 and 6 blocks for 32 x 32 colour images."""
    return _minimal_vit(
        "va_minimal_vit_nano_patch4_32_minimum",
        pretrained,
        NANO,
        {"img_size": 32, "patch_size": 4},
        VARIANTS["minimum"],
        kwargs,
    )


@register_model
def va_minimal_vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT of width 96 and 8 blocks for 32 x 32 colour images."""
    return _minimal_vit("va_minimal_vit_micro_patch4_32", pretrained, MICRO, {"img_size": 32, "patch_size": 4}, kwargs)


@register_model
def va_minimal_vit_micro_patch4_32_ep(pretrained: bool = False, **kwargs: Any) -> MinimalVisionTransformer:
    """ViT of width 96 and 8 blocks for 32 x 32 colour images, read out by efficient probing."""
    return _minimal_vit(
        "va_minimal_vit_micro_patch4_32_ep",
        pretrained,
        MICRO,
        {"img_size": 32, "patch_size": 4, "global_pool": "ep"},
        kwargs,
    )
