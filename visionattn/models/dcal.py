"""DCAL: a ViT with a second, global-local attention of the class token, trained with pairs of images.

The network consists of timm's `VisionTransformer` (class token, learned positions, pre-norm blocks, layer norm eps
1e-6) as the self-attention branch SA, followed by one block of global-local cross-attention, GLCA, with a norm and a
classifier of its own. Training adds a third branch, pair-wise cross-attention, PWCA, which shares all weights with SA
(equations: `visionattn.blocks.dual_cross`).

    forward             log of the mean of both branches' probabilities; with `sa_only` exactly the plain ViT
    forward_branches    class tokens of SA, GLCA and PWCA, which `branch_logits` turns into logits for one loss each
    embed               concatenated class tokens of SA and GLCA, (B, 2C), for retrieval; with `sa_only` (B, C)

By default the output of GLCA is its class token (`local_pool="token"`). In one block of cross-attention queries do not
see each other, so the R selected patches cannot change it: they, and the roll-out that selects them, are then not
computed. With `local_pool="avg"` the output is the mean of the class token and the selected patches.

Variants (224 x 224, 1000 classes; parameters counted):

    name                        C    blocks  heads  parameters   in GLCA's branch
    deit_tiny_patch16_224     192    12      3       6,355,664     638,248
    deit_small_patch16_224    384    12      6      24,210,896   2,160,232
    deit_base_patch16_224     768    12     12      94,426,064   7,858,408
    nano_patch4_32             64     6      4         358,804      50,762        32 x 32, 10 classes

Weights of a plain ViT load; GLCA's branch then keeps its initial values.

Source: DCAL, arXiv 2205.02151. It has no public code.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn, init_weights_vit_timm

from visionattn.blocks.dual_cross import DualCrossBlock, GlobalLocalCrossAttention, roll_out, select_local
from visionattn.errors import InputError

__all__ = ["DualCrossBranches", "DualCrossClassifier", "DualCrossTransformer"]

POOLS = ("token", "avg")


class DualCrossBranches(NamedTuple):
    """Outputs of the three branches, each with a loss: class tokens (B, C), or logits (B, num_classes).

    Attributes:
        sa: Self-attention.
        glca: Global-local cross-attention.
        pwca: Pair-wise cross-attention; its targets are those of the images themselves, not of their partners.
    """

    sa: torch.Tensor
    glca: torch.Tensor
    pwca: torch.Tensor


class DualCrossClassifier(nn.Linear):
    """Classifiers of SA, with timm's parameter names, and of GLCA.

    Args:
        dim: Number of channels C.
        num_classes: Number of classes.

    Shape:
        x (B, C), class tokens of SA; local (B, C), those of GLCA, or None -> (B, num_classes): logits of SA or, with
        both, the log of the mean of their probabilities.
    """

    def __init__(self, dim: int, num_classes: int, device=None, dtype=None) -> None:
        super().__init__(dim, num_classes, device=device, dtype=dtype)
        self.local = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, local: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C) -> (B, num_classes)."""
        logits = F.linear(x, self.weight, self.bias)
        if local is None:
            return logits
        return torch.logaddexp(logits.log_softmax(-1), self.local(local).log_softmax(-1)) - math.log(2)


class DualCrossTransformer(VisionTransformer):
    """Vision transformer with dual cross-attention (branches and variants: see the module).

    Args:
        img_size: Image size.
        patch_size: Side of a patch in pixels.
        in_chans: Image channels.
        num_classes: Classes; 0 for features, the class token of SA.
        global_pool: Read-out of SA; the class token, `"token"`, is the only one.
        embed_dim: Channels C.
        depth: Blocks of SA.
        num_heads: Heads of each block.
        mlp_ratio: Hidden width of the MLPs as a multiple of C.
        local_ratio: Fraction of the patches that GLCA selects, R, in 0..1.
        local_pool: Read-out of GLCA: `"token"` or `"avg"`.
        sa_only: Skip GLCA in `forward`.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes).

    Raises:
        InputError: A read-out is unknown, or `local_ratio` is not in 0..1.
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
        mlp_ratio: float = 4.0,
        local_ratio: float = 0.1,
        local_pool: str = "token",
        sa_only: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        def block(
            dim: int, num_heads: int, mlp_ratio: float, drop_path: float, device, dtype, **_: Any
        ) -> DualCrossBlock:
            # timm passes every option of its own blocks; this block has only these.
            return DualCrossBlock(dim, num_heads, mlp_ratio, drop_path=drop_path, device=device, dtype=dtype)

        if global_pool != "token":
            raise InputError(f"global_pool must be 'token', the class token; got {global_pool!r}.")
        if local_pool not in POOLS:
            raise InputError(f"local_pool must be one of {', '.join(map(repr, POOLS))}; got {local_pool!r}.")
        if not 0 <= local_ratio <= 1:
            raise InputError(f"local_ratio must be from 0 to 1; got {local_ratio}.")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            block_fn=block,
            device=device,
            dtype=dtype,
        )
        dd = {"device": device, "dtype": dtype}
        self.sa_only = sa_only
        self.local_ratio = local_ratio
        self.local_pool = local_pool
        # Patches are selected by the highest scores: rounding can change the selection.
        self.decides = local_pool == "avg"
        self.glca = GlobalLocalCrossAttention(embed_dim, num_heads, mlp_ratio, drop_path_rate, **dd)
        self.glca.apply(init_weights_vit_timm)
        self.norm_local = LayerNorm(embed_dim, **dd)
        self.reset_classifier(num_classes)
        self.register_load_state_dict_pre_hook(_take_plain)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers.

        Args:
            num_classes: Number of classes; 0: the output is the class token of SA.
            global_pool: `"token"`, `""` for all tokens of SA, or None for no change.

        Raises:
            InputError: The read-out is unknown.
        """
        if global_pool not in (None, "", "token"):
            raise InputError(f"global_pool must be 'token', the class token; got {global_pool!r}.")
        if global_pool is not None:
            self.global_pool = "token" if global_pool else ""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
            self.head = DualCrossClassifier(self.embed_dim, num_classes, **like)
            for classifier in (self.head, self.head.local):
                init_weights_vit_timm(classifier)

    def _look_again(self, x: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        """GLCA after the blocks: tokens (B, 1 + N, C) and the blocks' maps -> (B, 1, C)."""
        local = x[:, :1]
        if self.local_pool == "avg":
            local = select_local(x, roll_out(maps), int(self.local_ratio * self.patch_embed.num_patches))
        return self.norm_local(self.glca(local, x).mean(1, keepdim=True))

    # timm's own two methods also take attention masks, which these blocks do not have.
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Tokens after the last norm, then the token of GLCA: (B, in_chans, H, W) -> (B, 1 + N + 1, C).

        With `sa_only` the token of GLCA is missing.
        """
        x = self._pos_embed(self.patch_embed(x))
        maps: list[torch.Tensor] = []
        for block in self.blocks:
            if self.local_pool == "avg" and not self.sa_only:
                maps.append(block.attention_map(x))
            # TorchScript would compile both arms of an expression.
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108
                x = checkpoint(block, x)
            else:
                x = block(x)
        if self.sa_only:
            return self.norm(x)
        return torch.cat([self.norm(x), self._look_again(x, maps)], 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of `forward_features` -> (B, num_classes); without classes, the class token of SA."""
        if self.global_pool == "":
            return x if self.sa_only else x[:, :-1]
        sa = self.head_drop(x[:, 0])
        if pre_logits or self.num_classes == 0:
            return sa
        return self.head(sa) if self.sa_only else self.head(sa, self.head_drop(x[:, -1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in timm; the final features are those of `forward_features`."""
        found = super().forward_intermediates(x, *args, **kwargs)
        if isinstance(found, dict) and "image_features" in found:
            found["image_features"] = self.forward_features(x)
        return (self.forward_features(x), found[1]) if isinstance(found, tuple) else found

    @torch.jit.ignore
    def forward_branches(self, x: torch.Tensor, partner: torch.Tensor | None = None) -> DualCrossBranches:
        """Compute the class tokens of all three branches, for training.

        Args:
            x: Images (B, in_chans, H, W).
            partner: Index of the image of the batch that PWCA pairs each image with, (B,), int64. None: the previous
                image.

        Returns:
            Class tokens, (B, C) per branch.

        Raises:
            InputError: The model has `sa_only`.
        """
        if self.sa_only:
            raise InputError("With sa_only there is one branch: train with model(x), or set model.sa_only = False.")
        features = self.forward_features(x)
        y = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            other = y.roll(1, 0) if partner is None else y[partner]
            y = checkpoint(block.pairwise, y, other) if self.grad_checkpointing else block.pairwise(y, other)
        return DualCrossBranches(features[:, 0], features[:, -1], self.norm(y[:, 0]))

    @torch.jit.ignore
    def branch_logits(self, branches: DualCrossBranches) -> DualCrossBranches:
        """Logits of the class tokens of `forward_branches`; PWCA uses the classifier of SA."""
        sa, glca, pwca = (self.head_drop(tokens) for tokens in branches)
        return DualCrossBranches(self.head(sa), self.head.local(glca), self.head(pwca))

    @torch.jit.ignore
    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the class tokens of SA and GLCA: (B, in_chans, H, W) -> (B, 2C), or (B, C) with `sa_only`."""
        features = self.forward_features(x)
        return features[:, 0] if self.sa_only else torch.cat([features[:, 0], features[:, -1]], 1)


def _take_plain(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: weights of a plain ViT lack GLCA's branch, which keeps its own values."""
    local = (f"{prefix}glca.", f"{prefix}norm_local.", f"{prefix}head.local.")
    if not any(key.startswith(local) for key in state):
        own = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
        state.update({key: value for key, value in own.items() if key.startswith(local)})


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2205.02151",
        "paper_name": "Dual Cross-Attention Learning for Fine-Grained Visual Categorization "
        "and Object Re-Identification",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "va_dcal_deit_tiny_patch16_224.untrained": _cfg(),
        "va_dcal_deit_small_patch16_224.untrained": _cfg(),
        "va_dcal_deit_base_patch16_224.untrained": _cfg(),
        "va_dcal_nano_patch4_32.untrained": _cfg(
            input_size=(3, 32, 32),
            num_classes=10,
            crop_pct=1.0,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
    }
)


def _dcal(name: str, pretrained: bool, settings: dict[str, Any]) -> DualCrossTransformer:
    return build_model_with_cfg(
        DualCrossTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **settings,
    )


@register_model
def va_dcal_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> DualCrossTransformer:
    """DeiT-T; loads weights of timm's `deit_tiny_patch16_224`."""
    return _dcal("va_dcal_deit_tiny_patch16_224", pretrained, {"embed_dim": 192, "num_heads": 3, **kwargs})


@register_model
def va_dcal_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> DualCrossTransformer:
    """DeiT-S; loads weights of timm's `deit_small_patch16_224`."""
    return _dcal("va_dcal_deit_small_patch16_224", pretrained, {"embed_dim": 384, "num_heads": 6, **kwargs})


@register_model
def va_dcal_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> DualCrossTransformer:
    """DeiT-B; loads weights of timm's `deit_base_patch16_224`."""
    return _dcal("va_dcal_deit_base_patch16_224", pretrained, {"embed_dim": 768, "num_heads": 12, **kwargs})


@register_model
def va_dcal_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> DualCrossTransformer:
    """Width 64 and 6 blocks for 32 x 32 colour images."""
    nano = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4}
    return _dcal("va_dcal_nano_patch4_32", pretrained, {**nano, **kwargs})
