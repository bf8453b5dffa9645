"""Weight downloads without a network: one error message at once, and no retries."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import timm

from visionattn.errors import CheckpointError, shorten

__all__ = ["quick_when_offline"]

_PATIENCE = 5.0  # seconds for a connection


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
    if name.startswith(("hf-hub:", "hf_hub:")):
        return True
    if not pretrained or name.startswith("local-dir:"):
        return False
    try:
        config: Any = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag, reported by the caller
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
