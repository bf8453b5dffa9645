"""Published weights: what timm knows of them, and their download; without a network one error at once, no retries."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import timm

from visionattn.errors import CheckpointError, UnknownNameError, shorten

__all__ = ["HOSTED", "published_config", "quick_when_offline"]

HOSTED = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of names that stand for weights instead of architectures."""

_PATIENCE = 5.0  # seconds for a connection


def published_config(name: str) -> Any:
    """Configuration that timm has for the weights of a name; None if it is unknown, or refers to weights itself.

    Raises:
        UnknownNameError: The tag, the part after the dot, is unknown.
    """
    if name.startswith(HOSTED):
        return None
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        hint = "Leave out the part after the dot for the default weights."
        raise UnknownNameError(f"{shorten(error)} {hint}") from error


@contextmanager
def quick_when_offline(name: str, pretrained: bool) -> Iterator[None]:
    """Within the block, weights are loaded from the cache only if the Hugging Face Hub cannot be reached.

    Args:
        name: Name of the model that is built in the block.
        pretrained: Whether its weights are requested.

    Raises:
        CheckpointError: They are not in the cache.
    """
    if not _comes_from_hub(name, pretrained):
        yield
        return
    from huggingface_hub import constants, errors

    unreachable = None if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or unreachable is not None
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        reason = unreachable or "offline mode is on"
        raise CheckpointError(
            f"The weights of {shorten(name)!r} could not be downloaded: {reason}, and they are not in the cache. Give "
            "a weight file."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _comes_from_hub(name: str, pretrained: bool) -> bool:
    if name.startswith(HOSTED):
        return not name.startswith("local-dir:")
    if not pretrained:
        return False
    try:
        config = published_config(name)
    except UnknownNameError:  # reported by the caller
        return False
    return bool(config and config.hf_hub_id and not config.file)


def _unreachable(address: str) -> str | None:
    """Why a server cannot be reached, or None; behind a proxy only a request could find out."""
    if urllib.request.getproxies():
        return None
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname, parts.port or 443), _PATIENCE).close()
    except OSError as error:
        return f"{parts.hostname} cannot be reached ({error.strerror or error})"
    return None
