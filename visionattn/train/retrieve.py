r"""Training retrieval: embeddings f_c of an image under each attribute c, close if their values of c are equal.

    loss = mean over attributes c of  l(f_c of the images with a value of c, their values)

    triplet             mean of  max(0, m - cos(a, p) + cos(a, n))  over triplets where it is not 0
    multi_similarity    arXiv 1904.06627
    proxy_anchor        arXiv 2003.13911; learned proxies of each value
    normalized_softmax  arXiv 1811.12649; cross-entropy of the cosines to learned proxies, divided by T = 0.2

An attribute with one value in a batch gives 0. Losses and miners are pytorch-metric-learning's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.checkpoints import create
from visionattn.data.retrieval.catalogue import MISSING, Part, first_names
from visionattn.data.retrieval.embedding import conditions_of, embed, input_config
from visionattn.data.samplers import IGNORED
from visionattn.errors import CheckpointError, ConfigError, require
from visionattn.metrics.ranking import means, score_part
from visionattn.train.optimization import OptimizedTask

__all__ = ["BEGINNING", "AttributeLoss", "EmbeddingTask", "RankedTask", "RetrieveTask", "create_conditional"]

LOSSES = ("triplet", "multi_similarity", "proxy_anchor", "normalized_softmax")
PROXIES = ("proxy_anchor", "normalized_softmax")
# For the few values of an attribute, the usual 0.05 is satisfied by small differences of cosines, which rank worse.
TEMPERATURE = 0.2
BEGINNING = ("pretrained_backbone", "backbone_checkpoint")
MINERS = ("none", "semihard", "hard", "multi_similarity")


class EmbeddingTask(OptimizedTask, ABC):
    """A task that is validated and tested by the embeddings of a split's images, each embedded once.

    The network is `net`; the hyper-parameter `attributes` maps each attribute to its values. An evaluation batch
    begins with images and ends with their indices in the split.
    """

    def __init__(self, **optimization: Any) -> None:
        super().__init__(**optimization)
        self._found: list[tuple[Tensor, Tensor]] = []

    @property
    def trained(self) -> nn.Module:
        """The network and the parameters of its loss."""
        return self

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay in timm's optimizers: those that the network exempts."""
        exempt: Any = getattr(self.net, "no_weight_decay", set)
        return {f"net.{name}" for name in exempt()}

    @property
    def input_config(self) -> dict[str, Any]:
        """Input configuration of the model: size, mean, std, interpolation."""
        return input_config(self.net)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> L2-normalised embeddings (B, C, E)."""
        return embed(self.net, images)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Keep the embeddings of a batch."""
        self._found.append((self(batch[0]), batch[-1]))

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Keep the embeddings of a batch."""
        self._found.append((self(batch[0]), batch[-1]))

    def on_validation_epoch_end(self) -> None:
        """Log the quality of the embeddings."""
        self._judge("val")

    def on_test_epoch_end(self) -> None:
        """Log the quality of the embeddings."""
        self._judge("test")

    @abstractmethod
    def judge(self, name: str, embeddings: Tensor, part: Any) -> None:
        """Log the quality of the embeddings (N, C, E) of a split's images; `name` is val or test."""

    def _judge(self, name: str) -> None:
        embeddings, places = (torch.cat(tensors) for tensors in zip(*self._found))
        self._found = []
        if self.trainer.world_size > 1:
            gathered: Any = self.all_gather([embeddings, places])
            embeddings, places = (tensor.flatten(0, 1) for tensor in gathered)
        kept = places != IGNORED
        embeddings, places = embeddings[kept], places[kept]
        self.judge(name, embeddings, self.trainer.datamodule.part(name).take(places.cpu()))

    def check_checkpoint(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or with other attributes."""
        super().check_checkpoint(saved)
        names, own = list(saved.get("attributes", self.hparams.attributes)), list(self.hparams.attributes)
        if names != own:
            raise CheckpointError(
                f"The checkpoint was trained on the attributes {first_names(names)}; the data have {first_names(own)}."
            )


class RankedTask(EmbeddingTask):
    """A task that is validated and tested by ranking each split's gallery for its queries."""

    monitor = "val/map"

    def judge(self, name: str, embeddings: Tensor, part: Part) -> None:
        """Rank, and log mAP and recall."""
        if not (part.is_query.any() and part.is_gallery.any()):  # Lightning's sanity check with a few batches
            return
        scores = score_part(embeddings, part, tuple(self.hparams.attributes))
        plain, weighted = means(scores)
        for row in scores if len(scores) > 1 else ():
            self.log(f"{name}/map_{row.attribute}", row.map)
        self.log(f"{name}/map", plain.map, prog_bar=True)
        if len(scores) > 1:
            self.log(f"{name}/map_by_queries", weighted.map)
        for k, value in zip((1, 5, 10), plain[-3:]):
            self.log(f"{name}/recall_at_{k}", value)


def create_conditional(name: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    """A model that embeds images by the attributes in its settings.

    Raises:
        ConfigError: The model does not.
    """
    net = create(name, pretrained=pretrained, **settings)
    if conditions_of(net) != tuple(settings["attributes"]):
        raise ConfigError(f"model.name must be a va_cca_* model, which embeds images by attributes; got {name!r}.")
    return net


class AttributeLoss(nn.Module):
    """A loss of pytorch-metric-learning for each attribute (equations: see the module).

    Args:
        loss: triplet, multi_similarity, proxy_anchor or normalized_softmax.
        miner: Triplets or pairs to use: none (all), semihard, hard or multi_similarity.
        margin: m of the triplet loss.
        values: Number of values of each attribute.
        embed_dim: E.

    Raises:
        ConfigError: The loss or miner is unknown, or they cannot be combined.
        MissingPackageError: pytorch-metric-learning is not installed.
    """

    def __init__(self, loss: str, miner: str, margin: float, values: list[int], embed_dim: int) -> None:
        super().__init__()
        for what, name, known in (("loss", loss, LOSSES), ("miner", miner, MINERS)):
            if name not in known:
                raise ConfigError(f"model.{what} must be one of {', '.join(map(repr, known))}; got {name!r}.")
        if loss in PROXIES and miner != "none":
            raise ConfigError(f"{loss} compares images with proxies and needs no mining: set model.miner to none.")
        losses = require("pytorch_metric_learning.losses", "train")
        miners = require("pytorch_metric_learning.miners", "train")
        cosine = require("pytorch_metric_learning.distances", "train").CosineSimilarity()
        self.miner = {
            "none": lambda: None,
            "semihard": lambda: miners.TripletMarginMiner(margin, type_of_triplets="semihard", distance=cosine),
            "hard": lambda: miners.BatchHardMiner(distance=cosine),
            "multi_similarity": lambda: miners.MultiSimilarityMiner(),
        }[miner]()
        make = {
            "triplet": lambda count: losses.TripletMarginLoss(margin, distance=cosine),
            "multi_similarity": lambda count: losses.MultiSimilarityLoss(),
            "proxy_anchor": lambda count: losses.ProxyAnchorLoss(count, embed_dim),
            "normalized_softmax": lambda count: losses.NormalizedSoftmaxLoss(count, embed_dim, TEMPERATURE),
        }[loss]
        self.losses = nn.ModuleList([make(count) for count in values])

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Embeddings (B, C, E) and labels int64 (B, C), `MISSING` where a value is unknown -> the mean loss."""
        found = []
        for column, loss in enumerate(self.losses):
            kept = labels[:, column] != MISSING
            own, values = embeddings[kept, column], labels[kept, column]
            if len(values.unique()) < 2:
                # All parameters stay in the graph, since DDP requires a gradient for each.
                found.append(0 * own.sum() + sum(0 * parameter.sum() for parameter in loss.parameters()))
            else:
                found.append(loss(own, values, self.miner(own, values) if self.miner is not None else None))
        return torch.stack(found).mean()


class RetrieveTask(RankedTask):
    """A model that embeds images by attributes, and its training (equations: see the module).

    Args:
        name: Name in timm's registry of a model that takes `attributes` and returns (B, C, E), such as
            `va_cca_vit_tiny_patch16_224`, or `va_cca` with any `backbone` in `model_args`.
        model_args: Further arguments of the model, such as `embed_dim`, `head` and `backbone_checkpoint`.
        attributes: Attribute -> its values; follows from the data.
        pretrained: Start from the published weights.
        loss: triplet, multi_similarity, proxy_anchor or normalized_softmax.
        miner: Triplets or pairs to use: none (all), semihard, hard or multi_similarity.
        margin: m of the triplet loss.
        backbone_rate: Learning rate of the backbone relative to that of the head and the loss; 0 freezes it, including
            the statistics of its batch norms.
        **optimization: Arguments of `OptimizedTask`.
    """

    def __init__(
        self,
        name: str,
        model_args: dict[str, Any] | None = None,
        attributes: dict[str, list[str]] | None = None,
        pretrained: bool = False,
        loss: str = "triplet",
        miner: str = "none",
        margin: float = 0.2,
        backbone_rate: float = 1.0,
        **optimization: Any,
    ) -> None:
        if not 0 <= backbone_rate < math.inf:
            raise ConfigError(f"model.backbone_rate must be a finite number, at least 0; got {backbone_rate}.")
        if not attributes:
            raise ConfigError("Retrieval needs attributes with values: they follow from RetrieveData.")
        settings = {**(model_args or {}), "attributes": list(attributes)}
        # `visionattn.load` reads here how to build the network, without the initial weights.
        model_args = {key: value for key, value in settings.items() if key not in BEGINNING}
        super().__init__(**optimization)
        self.net = create_conditional(name, pretrained, settings)
        self._backbone = {key for key, _ in self.named_parameters() if key.startswith("net.backbone.")}
        if backbone_rate != 1 and not self._backbone:
            raise ConfigError(f"{name!r} has no separate backbone: remove model.backbone_rate.")
        if backbone_rate == 0:
            self.net.backbone.requires_grad_(False)
        with torch.no_grad():
            empty = torch.zeros(1, 3, *self.input_config["size"])
            embed_dim = embed(self.net.eval(), empty).shape[-1]
        self.net.train()
        self.loss = AttributeLoss(loss, miner, margin, [len(values) for values in attributes.values()], embed_dim)

    @property
    def parameter_groups(self) -> Callable[[nn.Module], list[dict[str, Any]]] | None:
        """Parameter groups if the backbone has its own learning rate."""
        return None if self.hparams.backbone_rate in (0, 1) else self._groups

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters by weight decay and learning rate; the backbone's is scaled by `backbone_rate`."""
        given, exempt = self.hparams, self.no_weight_decay()
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = given.backbone_rate if name in self._backbone else 1.0
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
            # timm's schedules multiply by lr_scale; without a schedule nothing does.
            lr = rate * given.lr if given.sched == "none" else given.lr
            settings = {"lr": lr, "lr_scale": rate, "weight_decay": given.weight_decay if decays else 0.0}
            group = groups.setdefault((rate, decays), {"params": [], **settings})
            group["params"].append(parameter)
        return list(groups.values())

    def on_train_epoch_start(self) -> None:
        """Keep a frozen backbone in evaluation mode."""
        if self.hparams.backbone_rate == 0:
            self.net.backbone.eval()  # type: ignore[union-attr]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss
