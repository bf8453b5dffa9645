r"""Mutual distillation of a pair encoder and an embedding, without labels: Trans-Encoder (arXiv 2109.13059) for images.

With f the embedding, p(x) the patches of the initial network, and y in [0, 1] the target similarity of two images,

    similarity(a, b) = (1 + cos(f(a), f(b))) / 2
    pair encoder:  y = similarity of the current embedding    loss = BCE(logit(p(a), p(b)), y),  in both orders
    embedding:     y = sigmoid(logit of the pair encoder)     loss = (similarity(a, b) - y)^2

A cycle consists of `pair_epochs` of the first and `embed_epochs` of the second. Each phase restarts its student: the
pair encoder from random weights, the embedding from the initial weights. Pairs are chosen once (`PairData`). The
published method uses the cosine itself as y, which is not a valid target of BCE where it is negative.

Training yields an embedding that is used without re-ranking, and the pair encoder, which re-ranks searches of the
initial network.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from visionattn.blocks.rerank import PairEncoder
from visionattn.checkpoints import create, load_weights
from visionattn.data.retrieval.catalogue import Part
from visionattn.data.retrieval.embedding import embed
from visionattn.data.retrieval.patches import read_patches
from visionattn.errors import ConfigError
from visionattn.metrics.ranking import score
from visionattn.train.retrieve import EmbeddingTask

__all__ = ["RerankTask", "embedding_loss", "pair_loss", "similarity"]

LABELLED = 256  # pairs whose labels are computed at a time
WARMUP = 0.1  # fraction of the pair encoder's steps in which its learning rate increases


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Vectors of length 1, (B, E) each -> (1 + cos) / 2, (B,)."""
    return (1 + (first * second).sum(dim=-1)) / 2


def pair_loss(logits: Tensor, alike: Tensor) -> Tensor:
    """Binary cross-entropy of a pair encoder's logits (B,) and the similarities of the embedding (B,)."""
    return F.binary_cross_entropy_with_logits(logits, alike, reduction="none")


def embedding_loss(alike: Tensor, logits: Tensor) -> Tensor:
    """Squared difference of the similarities of the embedding (B,) and the sigmoid of a pair encoder's logits (B,)."""
    return (alike - logits.sigmoid()).square()


class RerankTask(EmbeddingTask):
    """A backbone and a pair encoder, trained in alternating cycles (equations: see the module).

    `trainer.max_epochs` should be the number of cycles, 3 in the source, times `pair_epochs + embed_epochs`. The best
    checkpoint is selected by `val/map`, the embedding's mAP averaged over the attributes of the data; training does not
    use attributes. `visionattn search --rerank` accepts the checkpoint.

    Args:
        name: Name of a model in timm's registry; its pooled features are the embedding.
        model_args: Further arguments of the model, such as `img_size`, or `checkpoint_path` for the initial weights.
        attributes: Attribute -> its values; follows from the data.
        pretrained: Start from the published weights.
        pair_epochs: Epochs of the pair encoder per cycle.
        embed_epochs: Epochs of the embedding per cycle.
        width: Channels of the pair encoder, divisible by 16.
        depth: Number of blocks of the pair encoder.
        pair_lr: Peak learning rate of the pair encoder, warmed up for a tenth of its steps.
        lr: Peak learning rate of the embedding; both fall to 0 linearly.
        weight_decay: Weight decay.
        sched: "none": each phase has its own schedule.
        **optimization: Arguments of `OptimizedTask`.

    Raises:
        ConfigError: An argument is out of range, or training uses several devices.
        InputError: The model returns no patches.
    """

    monitor = "val/map"

    def __init__(
        self,
        name: str,
        model_args: dict[str, Any] | None = None,
        attributes: dict[str, list[str]] | None = None,
        pretrained: bool = False,
        pair_epochs: int = 1,
        embed_epochs: int = 1,
        width: int = 64,
        depth: int = 2,
        pair_lr: float = 1e-3,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        sched: str = "none",
        **optimization: Any,
    ) -> None:
        for key, value in {"pair_epochs": pair_epochs, "embed_epochs": embed_epochs, "depth": depth}.items():
            if value < 1:
                raise ConfigError(f"model.{key} must be 1 or more; got {value}.")
        if width < 16 or width % 16:
            raise ConfigError(f"model.width must be divisible by 16; got {width}.")
        if not 0 < pair_lr < float("inf"):
            raise ConfigError(f"model.pair_lr must be a finite number above 0; got {pair_lr}.")
        if sched != "none":
            raise ConfigError(f"model.sched must be 'none', as each phase has its own schedule; got {sched!r}.")
        model_args = {**(model_args or {}), "num_classes": 0}
        super().__init__(lr=lr, weight_decay=weight_decay, sched=sched, **optimization)
        weights = model_args.pop("checkpoint_path", None)
        self.net = create(name, pretrained=pretrained, **model_args)
        if weights is not None:
            load_weights(self.net, weights, drop_classifier=True)
        self.base = copy.deepcopy(self.net).requires_grad_(False)
        empty = torch.zeros(1, *resolve_model_data_config(self.net)["input_size"])
        self.pair_encoder = PairEncoder(read_patches(self.base.eval(), empty).shape[-1], width, depth)
        self._patches = torch.empty(0)
        self._labels: Tensor | None = None

    @property
    def trains_pairs(self) -> bool:
        """Whether the current epoch trains the pair encoder."""
        return self.current_epoch % self._period < self.hparams.pair_epochs

    @property
    def _period(self) -> int:
        return self.hparams.pair_epochs + self.hparams.embed_epochs

    def configure_optimizers(self) -> Any:
        """Create one optimizer; the model that a phase does not train gets no gradients and is unchanged."""
        optimizer: Any = super().configure_optimizers()
        pair = {id(parameter) for parameter in self.pair_encoder.parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in pair]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in pair]
            optimizer.add_param_group({**group, "params": own, "lr": self.hparams.pair_lr, "trains_pairs": True})
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        return optimizer

    def on_fit_start(self) -> None:
        """Read the patches of all training images, and choose the pairs with the initial network."""
        if self.trainer.world_size > 1:
            raise ConfigError("RerankTask requires one device: set trainer.devices to 1.")
        embeddings, patches = self._read_training_images(self.base, patches=True)
        self.trainer.datamodule.choose(embeddings)
        self._patches = patches

    def on_train_epoch_start(self) -> None:
        """Start a phase: label the pairs with one model, and reset the other."""
        place = self.current_epoch % self._period
        if place in (0, self.hparams.pair_epochs):
            self._labels = self._label()
            if self.trains_pairs:
                self._restart_pair_encoder()
            else:
                self.net.load_state_dict(self.base.state_dict())
            self.trainer.optimizers[0].state.clear()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rates: linear decay, for the pair encoder after a warm-up."""
        given, place = self.hparams, self.current_epoch % self._period
        epochs = given.pair_epochs if self.trains_pairs else given.embed_epochs
        epoch = place if self.trains_pairs else place - given.pair_epochs
        batches = self.trainer.num_training_batches
        progress = (epoch * batches + batch_idx) / (epochs * batches)
        for group in self.trainer.optimizers[0].param_groups:
            warmup = WARMUP if group.get("trains_pairs") else 0.0
            grown = (progress + 1 / (epochs * batches)) / warmup if warmup else 1.0
            group["lr"] = group["peak"] * min(grown, (1 - progress) / (1 - warmup))
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch: images (2 B, 3, H, W), both images of each pair in turn, and the indices of the pairs."""
        images, numbers = batch
        if self._labels is None:  # the run was resumed within a phase
            self._labels = self._label()
        labels = self._labels.to(self.device)[numbers]
        if self.trains_pairs:
            first, second = self._pair_patches(numbers)
            logits = torch.stack([self.pair_encoder(first, second), self.pair_encoder(second, first)])
            loss = pair_loss(logits, labels.expand_as(logits)).mean()
            self.log("train/pair_loss", loss, prog_bar=True)
        else:
            first, second = self(images)[:, 0].unflatten(0, (-1, 2)).unbind(dim=1)
            loss = embedding_loss(similarity(first, second), labels).mean()
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def judge(self, name: str, embeddings: Tensor, part: Part) -> None:
        """Rank by each attribute, and log the mean mAP."""
        if not (part.is_query.any() and part.is_gallery.any()):  # a test run of a few batches
            return
        attributes = self.hparams.attributes or {}
        found = [score(embeddings[:, 0], part, column, attribute).map for column, attribute in enumerate(attributes)]
        for attribute, value in zip(attributes, found):
            self.log(f"{name}/map_{attribute}", value)
        self.log(f"{name}/map", sum(found) / len(found), prog_bar=True)

    @torch.no_grad()
    def _label(self) -> Tensor:
        """Target of the phase for each pair, (P,): similarity of the embedding, or logit of the pair encoder."""
        pairs = self.trainer.datamodule.pairs
        if self.trains_pairs:
            embeddings, _ = self._read_training_images(self.net)
            first, second = embeddings[pairs.to(embeddings.device)].unbind(dim=1)
            return similarity(first, second)
        self.pair_encoder.eval()
        chunks = torch.arange(len(pairs)).split(LABELLED)
        found = torch.cat([self.pair_encoder.compare(*self._pair_patches(chunk)) for chunk in chunks])
        self.pair_encoder.train()
        return found

    def _pair_patches(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, N, D) of both images of some pairs."""
        first, second = self.trainer.datamodule.pairs[numbers.cpu()].unbind(dim=1)
        return self._patches[first].to(self.device).float(), self._patches[second].to(self.device).float()

    def _restart_pair_encoder(self) -> None:
        given, device = self.hparams, self.device
        fresh = PairEncoder(self._patches.shape[-1], given.width, given.depth)
        fresh.standardise_by(self._patches)
        self.pair_encoder.load_state_dict(fresh.to(device).state_dict())

    @torch.no_grad()
    def _read_training_images(self, net: nn.Module, patches: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings (N, E) of the training images in order, and with `patches` their patches, float16 on the CPU."""
        training = net.training
        net.eval()
        found, kept = [], []
        for images, _, _ in self.trainer.datamodule.train_images():
            images = images.to(self.device)
            found.append(embed(net, images)[:, 0])
            if patches:
                kept.append(read_patches(net, images).half().cpu())
        net.train(training)
        return torch.cat(found), torch.cat(kept) if patches else torch.empty(0)
