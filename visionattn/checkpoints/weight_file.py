"""A weight file: it is read once, tells which model it belongs to, and is loaded into a model that it fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visionattn.card import Card
from visionattn.errors import CheckpointError, VisionAttnError, shorten
from visionattn.weights import cca, match_stereo, minimal_vit, span
from visionattn.weights.comparing import check_values, count_bytes, mismatches, name_some
from visionattn.weights.ncnn import read_ncnn
from visionattn.weights.reading import read, unwrap

__all__ = ["WeightFile", "classifier_keys", "load_weights", "read_card"]


@dataclass(frozen=True)
class WeightFile:
    """A weight file that was read. Every error names the file.

    Attributes:
        path: The file.
        content: What it holds, in the wrappers of the code that wrote it.
        card: What it says of its model; None for bare weights.
    """

    path: Path
    content: Mapping[str, Any] = field(repr=False)
    card: Card | None

    @classmethod
    def read(cls, path: str | Path) -> WeightFile:
        """Read a file.

        Raises:
            CheckpointError: The file is unreadable, or its card is damaged.
        """
        path = Path(path)
        ncnn = path.suffix in (".param", ".bin") and path.with_suffix(".param").is_file()
        content = read_ncnn(path) if ncnn else read(path)
        with _naming(path):
            return cls(path, content, Card.read(content))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights, without wrappers and prefixes."""
        with _naming(self.path):
            return unwrap(self.content)

    @cached_property
    def bytes(self) -> int:
        """Memory that the weights take."""
        return count_bytes(self.state)

    def identify(self, name: str | None = None) -> tuple[str | None, dict[str, Any]]:
        """The model's name and arguments, as far as the file states them or its layout is a published one.

        Args:
            name: The model's name, if it is known.

        Returns:
            `name`, or else the one found, or None if only comparing shapes can tell; and the arguments that are known.

        Raises:
            CheckpointError: The weights are damaged, or of a network that no model here computes.
        """
        with _naming(self.path):
            args = cca.settings(self.state)
            published = None if self.card else span.identify(self.state) or match_stereo.identify(self.state, name)
        if self.card is not None and (name is None or name.split(".")[0] == self.card.name.split(".")[0]):
            return name or self.card.name, {**self.card.model_args, **args}
        if published is not None and name in (None, published[0]):
            return published[0], {**published[1], **args}
        return name, args

    def fit(self, wanted: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The weights under the names that a model has.

        Args:
            wanted: The model's own state dict.
            name: The model's name, for the message.

        Raises:
            CheckpointError: They do not fit it; the first mismatches are named.
        """
        with _naming(self.path):
            return self._fit(self.state, wanted, name)

    def _fit(self, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        for family in (span, match_stereo, minimal_vit):
            state = family.adapt(state, wanted)
        if wrong := mismatches(state, wanted):
            raise CheckpointError(f"{shorten(self.path)} does not fit {name}: {name_some(wrong)}.")
        return dict(state)

    def load_into(self, model: nn.Module, name: str | None = None, drop_classifier: bool = False) -> None:
        """Load the weights into a model that they must fit; the input images in the card become the model's.

        Args:
            model: A model of timm's registry.
            name: Its name, for messages. Default: its architecture.
            drop_classifier: As in `load_weights`.

        Raises:
            CheckpointError: They do not fit, or are NaN or infinite.
        """
        net: Any = model
        own, state = net.state_dict(), self.state
        name = name or net.pretrained_cfg.get("architecture") or type(net).__name__
        with _naming(self.path):
            if drop_classifier:
                state = _without_classifier(net, own, state)
            state = self._fit(state, own, name)
            check_values(state, own, self.path)
            net.load_state_dict({**own, **state})
            if self.card is not None:
                self.card.apply(net)


def read_card(path: str | Path) -> Card | None:
    """The card in a checkpoint; None for a file of bare weights.

    Raises:
        CheckpointError: The file is unreadable, or its card is damaged.
    """
    return WeightFile.read(path).card


def load_weights(model: nn.Module, path: str | Path, drop_classifier: bool = False) -> None:
    """Load a weight file into a model that it must fit; the input images in its card become the model's.

    Args:
        model: A model of timm's registry.
        path: A file, as `load` takes it.
        drop_classifier: Leave out the file's classifier; the model keeps its own, or has none. Files in another layout
            that timm reads, or of another image size, are converted as timm does.

    Raises:
        CheckpointError: The file is unreadable or does not fit, or holds NaN or infinite values.
    """
    WeightFile.read(path).load_into(model, drop_classifier=drop_classifier)


def classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the weight names of a timm model's classifier; there can be several, or none."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or ()
    return tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))


def _without_classifier(model: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the model's own classifier, and in the layout and for the image size of the model."""
    heads = classifier_keys(model)
    kept = {key: value for key, value in own.items() if key.startswith(heads)}
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and mismatches({**state, **kept}, own):
        state = convert(state, model)
    return {**state, **kept}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file name to errors, and turn errors from damaged weights into one line."""
    try:
        yield
    except VisionAttnError as error:
        if shorten(path) in str(error):
            raise
        raise CheckpointError(f"{shorten(path)}: {error}") from error
    except Exception as error:
        # Detecting the layout uses shapes that a damaged file need not have.
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise CheckpointError(
            f"{shorten(path)} is damaged: its weights do not have the shapes of a network ({reason})."
        ) from error
