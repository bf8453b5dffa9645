"""Writing checkpoints whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from visionattn.errors import CheckpointError
from visionattn.files import write_state

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, put under their name only when they are complete.

    A full disk leaves the previous checkpoint untouched and raises `StorageError`; a file that is no checkpoint raises
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
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError as error:
            raise CheckpointError(f"There is no checkpoint {path}.") from error
        except Exception as error:
            # Broken archives and pickles raise RuntimeError, UnpicklingError, EOFError, KeyError and more.
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: it is damaged, of another format, or holds more than tensors "
                "and plain values."
            ) from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise CheckpointError(
                f"{path} is not a checkpoint of a training run. Weights alone are loaded by model_args: "
                "{checkpoint_path: FILE}."
            )
        return checkpoint
