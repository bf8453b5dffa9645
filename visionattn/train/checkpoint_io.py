"""Writing checkpoints atomically."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from visionattn.errors import CheckpointError, shorten
from visionattn.files import write_state
from visionattn.weights import check_archive

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, moved to their final name only when complete.

    A full disk leaves the previous checkpoint untouched and raises `StorageError`; an invalid checkpoint file raises
    `CheckpointError`. Remote paths (`s3://...`) are written by Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_state(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        if "://" not in str(path) and Path(path).is_file():
            check_archive(path)
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError as error:
            raise CheckpointError(f"There is no checkpoint {path}.") from error
        except IsADirectoryError as error:
            raise CheckpointError(f"{shorten(path)} is a folder: give the checkpoint, then the images.") from error
        except Exception as error:
            # Damaged archives and pickles raise RuntimeError, UnpicklingError, EOFError, KeyError and more.
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is damaged, has another format, or holds more than tensors "
                "and plain values."
            ) from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise CheckpointError(
                f"{shorten(path)} is not a training checkpoint. To load weights only, use model_args: "
                "{checkpoint_path: FILE}."
            )
        if wrong := _fault(checkpoint):
            raise CheckpointError(f"The checkpoint {shorten(path)} is damaged: {wrong}.")
        return checkpoint


# Entries that Lightning and the tasks read first.
_ENTRIES: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}


def _fault(checkpoint: dict[str, Any]) -> str | None:
    """Description of an entry whose type differs from what Lightning writes, or None."""
    if not all(isinstance(key, str) for key in checkpoint):
        return "one of its keys is not a string"
    for key, kind in _ENTRIES.items():
        if key not in checkpoint:
            continue
        value = checkpoint[key]
        if not isinstance(value, kind):
            return f"its {key} must be a {kind.__name__}, but is a {type(value).__name__}"
        if isinstance(value, int) and value < 0:
            return f"its {key} is {value}"
    if not re.fullmatch(r"\d+\.\d+[\w.+-]*", str(checkpoint["pytorch-lightning_version"])):
        return "it has no Lightning version"
    for key, value in checkpoint["state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return f"its weight {shorten(key, 60)} is not a dense tensor"
    return None
