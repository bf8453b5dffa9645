"""Attribute retrieval: one embedding of an image per attribute, from a single pass of any backbone.

    tokens = backbone(image)                      (B, N, D): a ViT's tokens after its last norm, or the pixels of a map
    f_c    = head(tokens, c)                      (B, C, E), of length 1: one condition per attribute

The head is conditional cross-attention (`head="cca"`, equations: `visionattn.blocks.conditional`) or a baseline
(`"linear"`, `"csn"`, `"asen"`: `visionattn.blocks.condition_heads`). Conditions enter after the backbone, so that it
runs once for all attributes, and tower and head can be stored, exported and cached separately. The similarity of two
images under an attribute is the cosine of their embeddings for it.

Names (parameters in total, parameters of the head, and GMACs for one image and one attribute):

    va_cca_vit_tiny_patch16_224             5,994,752     470,336   1.25
    va_cca_vit_small_patch16_224           22,555,136     889,472   4.60
    va_cca_mobilenetv2_100                  3,573,888   1,350,016   0.30
    va_cca_tf_efficientnet_lite0            4,721,024   1,350,016   0.39
    va_cca_minimal_vit_tiny_patch16_224     5,994,752     470,336   1.25
    va_cca_minimal_vit_nano_patch4_32         365,952      58,560   0.02
    va_cca_halonet_h0                       6,068,928     823,680   2.31
    va_cca_halonet_nano_32                    300,176     215,296   0.02
    va_cca                                 any backbone in timm's registry, `backbone=NAME`; resnet18 by default

Attributes are given at construction: `create_model("va_cca_vit_tiny_patch16_224", attributes=["colour", "kind"])`.
More can be added later and trained alone, which leaves the embeddings of the existing ones bitwise unchanged.

Source of the idea: CCA, arXiv 2307.13254, of which only the abstract was accessible. Backbone, position and number of
the conditional layers, widths and losses are our choice, and no result of that paper is claimed.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from visionattn import weights
from visionattn.blocks.condition_heads import AttributeSpecificAttention, ConditionalSimilarityMask, ConditionLinear
from visionattn.blocks.conditional import ConditionalCrossAttention
from visionattn.errors import CheckpointError, InputError, UnknownNameError
from visionattn.models import halonet as _halonet  # noqa: F401  registers backbones
from visionattn.models import minimal_vit as _minimal_vit  # noqa: F401
from visionattn.weights import SHIPPED
from visionattn.weights.cca import NAMES, decode_names, encode_names

__all__ = ["HEADS", "AttributeRetrieval"]

# Width of a head of conditional cross-attention, and its maximum number of heads.
HEAD_DIM, MOST_HEADS = 64, 4


def _cca(dim: int, num_conditions: int, embed_dim: int, class_token: bool, **more: Any) -> nn.Module:
    heads = max(1, min(MOST_HEADS, dim // HEAD_DIM))
    return ConditionalCrossAttention(
        dim, num_conditions, embed_dim, **{"width": HEAD_DIM * heads, "num_heads": heads, **more}
    )


def _linear(dim: int, num_conditions: int, embed_dim: int, class_token: bool, **more: Any) -> nn.Module:
    return ConditionLinear(dim, num_conditions, embed_dim, class_token=class_token, **more)


def _csn(dim: int, num_conditions: int, embed_dim: int, class_token: bool, **more: Any) -> nn.Module:
    return ConditionalSimilarityMask(dim, num_conditions, embed_dim, class_token=class_token, **more)


def _asen(dim: int, num_conditions: int, embed_dim: int, class_token: bool, **more: Any) -> nn.Module:
    return AttributeSpecificAttention(dim, num_conditions, embed_dim, **more)


HEADS: dict[str, Callable[..., nn.Module]] = {"cca": _cca, "linear": _linear, "csn": _csn, "asen": _asen}


class AttributeRetrieval(nn.Module):
    """A backbone and a head that embeds its tokens under each attribute (see the module).

    Args:
        backbone: Name in timm's registry.
        attributes: Names of the attributes, in the order of the embeddings.
        embed_dim: Width E of an embedding.
        head: `"cca"`, `"linear"`, `"csn"` or `"asen"`.
        in_chans: Image channels.
        img_size: Image size in pixels, for a backbone of fixed size; None: the backbone's default.
        pretrained_backbone: Load the backbone's default weights through timm, which may download them.
        backbone_checkpoint: File of the backbone's weights, in timm's layout, with or without a classifier.
        backbone_args: Further arguments of the backbone.
        head_args: Further arguments of the head, such as `num_tokens` and `depth` of conditional cross-attention.

    Attributes:
        attributes: Names of the attributes.
        backbone: The backbone, without a classifier.
        head: Tokens (B, N, D), condition ids (C,), int64 -> (B, C, E).

    Shape:
        (B, in_chans, H, W) -> (B, C, E), each embedding of length 1.

    Raises:
        InputError: No attribute is given, one is given twice, or the head is unknown.
        CheckpointError: The backbone's file cannot be read, or belongs to another backbone.
    """

    task = "retrieve"
    output_names = ("embeddings",)
    size_multiple = 1
    size_minimum: int | None = 1
    num_classes = 0

    def __init__(
        self,
        backbone: str = "resnet18",
        attributes: Sequence[str] = ("overall",),
        embed_dim: int = 128,
        head: str = "cca",
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        pretrained_backbone: bool = False,
        backbone_checkpoint: str | Path | None = None,
        backbone_args: dict[str, Any] | None = None,
        head_args: dict[str, Any] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self._arguments: dict[str, Any] = {}
        if head not in HEADS:
            raise InputError(f"head must be one of {', '.join(map(repr, HEADS))}; got {head!r}.")
        settings: dict[str, Any] = {"in_chans": in_chans, **(backbone_args or {})}
        if img_size is not None:
            settings["img_size"] = img_size
        self.backbone: Any = timm.create_model(backbone, pretrained_backbone, num_classes=0, **settings, **dd)
        if backbone_checkpoint is not None:
            _read_backbone(self.backbone, backbone_checkpoint)
        self.num_features = self.backbone.num_features
        self.embed_dim = embed_dim
        self.in_chans = in_chans
        self.size_multiple = getattr(self.backbone, "size_multiple", 1)
        self.size_minimum = getattr(self.backbone, "size_minimum", None)
        self._traits = dict(self.backbone._traits, first_conv=_prefixed(self.backbone._traits.get("first_conv")))
        class_token = getattr(self.backbone, "cls_token", None) is not None
        self._name(attributes, device)
        self.head: Any = HEADS[head](
            self.num_features, len(self.attributes), embed_dim, class_token, **(head_args or {}), **dd
        )

    @property
    def _model_args(self) -> dict[str, Any]:
        """Arguments that timm saves next to the weights to rebuild the model, with the current attributes.

        The source of the backbone's initial weights is left out, because saved weights replace them.
        """
        return {**self._arguments, "attributes": list(self.attributes)}

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        gone = ("pretrained_backbone", "backbone_checkpoint")
        self._arguments = {key: value for key, value in arguments.items() if key not in gone}

    def _name(self, attributes: Sequence[str], device) -> None:
        if isinstance(attributes, str) or not attributes or len(set(attributes)) < len(attributes):
            raise InputError(f"attributes must be a list of one or more different names; got {attributes!r}.")
        self.attributes = tuple(attributes)
        self.register_buffer(NAMES, encode_names(self.attributes).to(device))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        found = state_dict.get(prefix + NAMES)
        if found is not None and decode_names(found) != self.attributes:
            errors.append(
                f"The weights are for the attributes {', '.join(decode_names(found))}; the model has "
                f"{', '.join(self.attributes)}."
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: those of the backbone, and the table of conditions."""
        backbone: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        rows = {name for name, _ in self.named_parameters() if name.startswith("head.table.")}
        return {f"backbone.{name}" for name in backbone} | rows

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing in the backbone: activations are recomputed in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def add_attributes(self, attributes: Sequence[str]) -> list[nn.Parameter]:
        """Add attributes after the existing ones.

        Returns:
            The parameters of the new attributes alone. Training only these leaves the embeddings of the other
            attributes unchanged.

        Raises:
            InputError: One of them exists already, or the head has no room for more.
        """
        count = len(self.attributes)
        self._name((*self.attributes, *attributes), self.attribute_names.device)
        try:
            return self.head.add_conditions(len(attributes))
        except InputError:
            self._name(self.attributes[:count], self.attribute_names.device)
            raise

    def condition_ids(self, conditions: torch.Tensor | Iterable[str | int] | None) -> torch.Tensor | None:
        """Convert attributes to their indices in the table.

        Args:
            conditions: Names or indices, or an int64 tensor of indices, which is returned as it is; None: all.

        Returns:
            (C,), int64, or None.

        Raises:
            UnknownNameError: The model does not have one of the attributes.
            InputError: A single name or index is given instead of a list, or the list is empty.
        """
        if conditions is None or isinstance(conditions, torch.Tensor):
            return conditions
        if isinstance(conditions, str | int):
            raise InputError(f"Attributes must be given as a list: [{conditions!r}].")
        ids = [self._place(condition) for condition in conditions]
        if not ids:
            raise InputError("The list of attributes is empty: give at least one, or None for all.")
        return torch.tensor(ids, device=self.attribute_names.device)

    def _place(self, condition: str | int) -> int:
        if isinstance(condition, str) and condition in self.attributes:
            return self.attributes.index(condition)
        if not isinstance(condition, str) and 0 <= condition < len(self.attributes):
            return int(condition)
        near = difflib.get_close_matches(str(condition), self.attributes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(
            f"There is no attribute {condition!r}.{hint} This model has {', '.join(map(repr, self.attributes))}, "
            f"indices 0 to {len(self.attributes) - 1}."
        )

    def forward_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Compute tokens: images (B, in_chans, H, W) -> tokens (B, N, D), from which any attribute can be embedded."""
        x = self.backbone.forward_features(x)
        if x.ndim == 4:
            last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            # After flatten(2).transpose(1, 2) the gradient of one image has strides that PyTorch's batch norm misreads.
            x = (x if last else x.permute(0, 2, 3, 1)).flatten(1, 2)
        return x

    def forward(self, x: torch.Tensor, conditions: torch.Tensor | Iterable[str | int] | None = None) -> torch.Tensor:
        """Embed images under some attributes, the same ones for every image.

        Args:
            x: Images (B, in_chans, H, W).
            conditions: Attributes, see `condition_ids`.

        Returns:
            Embeddings (B, C, E), in the order of `conditions`.
        """
        ids = self.condition_ids(conditions)
        return self.head(self.forward_tokens(x), ids)

    def embed_pairs(self, x: torch.Tensor, conditions: torch.Tensor | Iterable[str | int]) -> torch.Tensor:
        """Embed each image under an attribute of its own.

        Args:
            x: Images (B, in_chans, H, W).
            conditions: One attribute per image (see `condition_ids`).

        Returns:
            Embeddings (B, E).

        Raises:
            InputError: The number of attributes differs from the number of images.
        """
        ids = self.condition_ids(conditions)
        if ids is None or ids.shape != x.shape[:1]:
            raise InputError(
                f"{len(x)} images require one attribute each; got {'none' if ids is None else tuple(ids.shape)}."
            )
        embeddings = self.head(self.forward_tokens(x))  # (B, C, E): each further condition is cheap
        index = ids.view(-1, 1, 1).expand(-1, 1, embeddings.shape[2])
        return embeddings.gather(1, index).squeeze(1)


def _prefixed(first_conv: Any) -> Any:
    if isinstance(first_conv, str):
        return f"backbone.{first_conv}"
    return tuple(f"backbone.{name}" for name in first_conv) if first_conv else first_conv


def _read_backbone(backbone: Any, path: str | Path) -> None:
    """Load the weights of a backbone, without those of a classifier."""
    own, card = backbone.state_dict(), backbone.pretrained_cfg
    state = weights.unwrap(weights.read(path))
    # Counters of batch norm are not weights, and files may lack them.
    state = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **state}
    names = card.get("classifier") or ()
    classifier = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    state = {key: value for key, value in state.items() if not key.startswith(classifier)}
    wrong = weights.mismatches(state, own)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path} does not fit {card['architecture']}: {'; '.join(wrong[:3])}{more}.")
    backbone.load_state_dict(state)


BACKBONES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "mobilenetv2_100",
    "tf_efficientnet_lite0",
    "va_minimal_vit_tiny_patch16_224",
    "va_minimal_vit_nano_patch4_32",
    "va_halonet_h0",
    "va_halonet_nano_32",
)
# Entries of the preprocessing, which are the backbone's.
INPUT = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


# Of names with weights in the package: their tag, and the arguments that the weights were trained with.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "va_cca_halonet_nano_32": (
        "objects",
        {"attributes": ("shape", "colour", "texture", "size", "background"), "embed_dim": 32},
    )
}


def _cfg(backbone: str) -> dict[str, Any]:
    source: Any = timm.get_pretrained_cfg(backbone)
    return {
        **{key: getattr(source, key) for key in INPUT if getattr(source, key) is not None},
        "num_classes": -1,  # no classifier
        "first_conv": _prefixed(source.first_conv),
        "classifier": None,
        "paper_ids": "arXiv:2307.13254",
        "paper_name": "Conditional Cross Attention Network for Multi-Space Embedding without Entanglement "
        "in Only a SINGLE Network",
        "license": "apache-2.0",
    }


def _named(backbone: str) -> str:
    return f"va_cca_{backbone.removeprefix('va_')}"


def _tagged(backbone: str) -> dict[str, dict[str, Any]]:
    name, cfg = _named(backbone), _cfg(backbone)
    if name not in TRAINED:
        return {f"{name}.untrained": cfg}
    return {f"{name}.{TRAINED[name][0]}": {**cfg, "file": str(SHIPPED / f"{name}.safetensors")}}


default_cfgs = generate_default_cfgs(
    {"va_cca.untrained": _cfg("resnet18")}
    | {name: cfg for backbone in BACKBONES for name, cfg in _tagged(backbone).items()}
)


def _build(name: str, pretrained: bool, settings: dict[str, Any]) -> AttributeRetrieval:
    """Build a network by timm's rules, which pass `num_classes`, here 0, to every model."""
    if settings.get("num_classes"):
        raise TypeError(f"{name} has no classes: num_classes must be 0; got {settings['num_classes']}.")
    model: Any = build_model_with_cfg(AttributeRetrieval, name, pretrained, kwargs_filter=("num_classes",), **settings)
    card = model.backbone.pretrained_cfg
    own = {key: card[key] for key in INPUT if card.get(key) is not None}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **own}
    return model


@register_model
def va_cca(pretrained: bool = False, **kwargs: Any) -> AttributeRetrieval:
    """Attribute retrieval with any backbone of timm's registry, `backbone=NAME`."""
    return _build("va_cca", pretrained, {"backbone": "resnet18", **kwargs})


def _entry_point(backbone: str) -> Callable[..., AttributeRetrieval]:
    """Create the entry point of a backbone; timm registers it under the function's name."""
    name = _named(backbone)

    def entry_point(pretrained: bool = False, **kwargs: Any) -> AttributeRetrieval:
        trained = TRAINED[name][1] if pretrained and name in TRAINED else {}
        return _build(name, pretrained, {"backbone": backbone, **trained, **kwargs})

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"Attribute retrieval with the backbone `{backbone}`."
    return register_model(entry_point)


for _backbone in BACKBONES:
    globals()[_named(_backbone)] = _entry_point(_backbone)
