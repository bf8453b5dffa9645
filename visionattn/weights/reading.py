"""Reading a weight file safely, and taking its state dict out of the wrappers of training code."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from visionattn.errors import CheckpointError, shorten
from visionattn.weights.comparing import name_some

__all__ = ["check_archive", "read", "unwrap"]

# In timm's order: averaged weights come first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "params_ema", "params")
PREFIXES = ("module.", "_orig_mod.", "net.")
_DEEPEST = 8
_ROOM = 2**26  # bytes by which the unpacked size of an archive may exceed four times its size


def check_archive(path: str | Path) -> None:
    """Verify the checksums of a file written by `torch.save`, which `torch.load` ignores.

    Files that are not archives, such as safetensors and old pickles, have no checksums and pass.

    Raises:
        CheckpointError: The file is damaged, or unpacks to far more than its size.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            unpacked, size = sum(entry.file_size for entry in entries), Path(path).stat().st_size
            if unpacked > 4 * size + _ROOM:
                raise CheckpointError(
                    f"{shorten(path)} has {size / 1e6:,.1f} MB and would unpack to {unpacked / 1e6:,.1f} MB: it is not "
                    "a checkpoint."
                )
            for entry in entries:
                # Without checksums, as torch.serialization.set_crc32_options(False) writes, nothing can be verified.
                if entry.CRC:
                    with archive.open(entry) as part:
                        while part.read(2**20):
                            pass
    except CheckpointError:
        raise
    except Exception as error:  # a damaged directory of an archive can fail in any way
        raise CheckpointError(f"{shorten(path)} is damaged: {shorten(error)}.") from error


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file: safetensors, or a pickle of plain types and tensors (`weights_only`).

    Raises:
        CheckpointError: The file does not exist, is damaged (checksums of archives of `torch.save` are verified), or
            contains objects that would run code.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(
                f"{shorten(path)} is not a regular file." if path.exists() else f"There is no file {shorten(path)}."
            )
        if path.suffix == ".safetensors":
            return load_file(path)
        check_archive(path)
        # timm's training checkpoints hold their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's message also advises loading the file unsafely; only the reason is kept.
        named = re.search(r"GLOBAL (\S+) was not", str(error))
        reason = f"; it contains {shorten(named[1])}" if named else ""
        raise CheckpointError(
            f"{shorten(path)} cannot be loaded: a checkpoint must contain only tensors and plain types{reason}."
        ) from error
    # A damaged pickle can raise any exception.
    except Exception as error:
        raise CheckpointError(f"Could not read the checkpoint {shorten(path)}: {shorten(error)}.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{shorten(path)} holds a {type(content).__name__}, not a dictionary of weights.")
    return dict(content)


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take a state dict out of training wrappers, and remove training prefixes from its keys.

    From a checkpoint of a training task only the network is taken, whose keys start with `net.`.

    Raises:
        CheckpointError: It contains no tensors, or tensors that are not plain.
    """
    found: Mapping[Any, Any] = content
    trained = "pytorch-lightning_version" in content or "hyper_parameters" in content
    for _ in range(_DEEPEST):
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    state = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        some = ", ".join(shorten(key, 40) for key in list(content)[:5])
        raise CheckpointError(f"The checkpoint holds no weights; its entries are {some or 'none'}.")
    if strange := [key for key, value in state.items() if not _is_plain(value)]:
        raise CheckpointError(f"The checkpoint contains tensors that are not plain: {name_some(strange)}.")
    # A task can train more than its network, such as a decoder that is discarded.
    if trained and (network := {key: value for key, value in state.items() if key.startswith("net.")}):
        state = network
    return _without_prefixes(state)


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        prefix = next((one for one in PREFIXES if all(key.startswith(one) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, real, on the CPU, and no larger than its storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu" or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes() + 2**20
