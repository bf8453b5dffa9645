r"""Masked image modelling: a ViT learns from unlabelled images by reconstructing masked patches.

An image is cut into N patches of p x p pixels; t_n in R^{p p C} is patch n, normalised to zero mean and unit variance.
The encoder, the network to be trained, sees a random quarter of the patches, V; a small decoder sees
its output, and one learned vector u in place of each hidden patch, all with positions:

    z   = encoder(patches in V)                              (B, 1 + |V|, C)
    y_n = W z_n  for n in V,  else u,  plus position n       (B, 1 + N, C')
    L   = mean over n not in V of |head(decoder(y))_n - t_n|^2 / (p p C)

Hidden patches cost the encoder nothing: a step takes about a quarter of a supervised one. Predicting each
patch's mean gives L = 1, so 1 - L is the fraction of the hidden patches' variance that is explained.

Source: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torchmetrics import MeanMetric

from visionattn.checkpoints import create
from visionattn.data.samplers import IGNORED
from visionattn.errors import ConfigError
from visionattn.train.optimization import OptimizedTask

__all__ = ["MaskedTask"]


class PatchDecoder(nn.Module):
    """Decoder that reconstructs all patches from the encoded visible ones; discarded after pre-training.

    Args:
        in_dim: Width C of the encoder.
        dim: Width C' of the decoder.
        depth: Blocks.
        num_heads: Heads.
        grid: Height and width of the image in patches.
        num_prefix_tokens: Tokens of the encoder before the patches.
        patch_values: Elements of a patch, p p times the number of image channels.
    """

    positions: torch.Tensor

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        patch_values: int,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(in_dim, dim)
        self.hidden = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), dim), persistent=False)  # (N, C')
        self.blocks = nn.Sequential(*[Block(dim, num_heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_values)

    def forward(self, encoded: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Encoded (B, prefix + |V|, C) and the indices of V (B, |V|) -> (B, N, patch_values)."""
        y = self.embed(encoded)
        prefix, visible = y.tensor_split([self.num_prefix_tokens], dim=1)
        places = shown[..., None].expand_as(visible)
        every = self.hidden.to(y.dtype).expand(len(y), len(self.positions), -1).scatter(1, places, visible)
        every = every + self.positions
        return self.head(self.norm(self.blocks(torch.cat([prefix, every], dim=1))))[:, self.num_prefix_tokens :]


class MaskedTask(OptimizedTask):
    """A vision transformer, pre-trained as a masked autoencoder (equations: see the module).

    Args:
        name: Name of a model in timm's registry that is a `VisionTransformer` with learned positions.
        model_args: Further arguments of the model.
        mask_ratio: Fraction of the patches that is hidden.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Heads of the decoder.
        **optimization: Arguments of `OptimizedTask`; `compile` compiles encoder and decoder.
    """

    net: Any
    monitor = "val/explained_variance"

    def __init__(
        self,
        name: str = "va_minimal_vit_micro_patch4_32",
        model_args: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        decoder_dim: int = 64,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        **optimization: Any,
    ) -> None:
        # Without a classifier; `visionattn.load` reads here how to build the network.
        model_args = {**(model_args or {}), "num_classes": 0}
        super().__init__(**optimization)
        # Set by the recipe and the data on the command line.
        self.hparams["model_args"] = model_args
        self.hparams.pop("num_classes", None)
        encoder: Any = create(name, **model_args)
        if not isinstance(encoder, VisionTransformer) or encoder.pos_embed is None:
            raise ConfigError(f"model.name must be a VisionTransformer with learned positions; got {name!r}.")
        grid = encoder.patch_embed.grid_size
        self.num_shown = round(grid[0] * grid[1] * (1 - mask_ratio))
        if not 0 < self.num_shown < grid[0] * grid[1]:
            raise ConfigError(
                f"model.mask_ratio must leave at least one of {grid[0]} x {grid[1]} patches visible, and not all; "
                f"{mask_ratio} leaves {self.num_shown}."
            )
        if decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ConfigError(f"model.decoder_dim ({decoder_dim}) must be divisible by 4 and by model.decoder_heads.")
        self.net = encoder
        self.decoder = PatchDecoder(
            encoder.embed_dim,
            decoder_dim,
            decoder_depth,
            decoder_heads,
            grid,
            encoder.num_prefix_tokens,
            encoder.patch_embed.proj.weight[0].numel(),
        )
        self.val_loss = MeanMetric()

    @property
    def trained(self) -> nn.Module:
        """The network and its decoder."""
        return self

    @property
    def data_config(self) -> dict[str, Any]:
        """Input configuration of the model: input_size, mean, std, interpolation, crop_pct."""
        return resolve_model_data_config(self.net)

    @property
    def compiled(self) -> list[nn.Module]:
        """The encoder's blocks and the decoder; the encoder's forward is not called as a whole."""
        return [self.net.blocks, self.decoder]

    def encode(self, images: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) and the indices of visible patches (B, |V|) -> tokens (B, prefix + |V|, C)."""
        net: Any = self.net
        tokens = net.norm_pre(net._pos_embed(net.patch_embed(images)))
        prefix, patches = tokens.tensor_split([net.num_prefix_tokens], dim=1)
        visible = patches.gather(1, shown[..., None].expand(-1, -1, patches.shape[2]))
        return net.norm(net.blocks(torch.cat([prefix, visible], dim=1)))

    def losses(self, images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """The loss L of each image.

        Args:
            images: (B, C, H, W).
            order: (B, N), a permutation of the patches of each image: the first ones are visible.
        """
        shown, hidden = order.tensor_split([self.num_shown], dim=1)
        painted = self.decoder(self.encode(images, shown), shown)
        wanted = self.patches(images)
        wanted = wanted - wanted.mean(dim=-1, keepdim=True)
        wanted = wanted * (wanted.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        return (painted - wanted).square().mean(dim=-1).gather(1, hidden).mean(dim=1)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, p p C)."""
        height, width = self.net.patch_embed.patch_size
        return nn.functional.unfold(images, (height, width), stride=(height, width)).transpose(1, 2)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of one batch; labels are ignored."""
        images = batch[0]
        loss = self.losses(images, self._orders(images, None)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Explained variance of the hidden patches, with the same mask in every epoch."""
        images, labels = batch
        generator = torch.Generator(images.device).manual_seed(batch_idx)
        losses = self.losses(images, self._orders(images, generator))[labels != IGNORED]
        if len(losses):
            self.val_loss.update(losses)

    def on_validation_epoch_end(self) -> None:
        """Log the metric."""
        loss = self.val_loss.compute()
        self.log("val/loss", loss)
        self.log("val/explained_variance", 1 - loss, prog_bar=True)
        self.val_loss.reset()

    def _orders(self, images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        rows, columns = self.net.patch_embed.grid_size
        return torch.rand(len(images), rows * columns, device=images.device, generator=generator).argsort(dim=1)
