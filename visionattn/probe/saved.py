"""Read the tensor files of a probing run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visionattn.errors import DataError, VisionAttnError, shorten
from visionattn.weights import check_archive

__all__ = ["read_state"]


def read_state(path: str | Path) -> Any:
    """Read a file of `visionattn.files.write_state`: tensors on the CPU and plain values.

    Raises:
        DataError: The file is missing, damaged (even in a single bit), or another file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"Could not read {shorten(path)}: it is not a regular file.")
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except VisionAttnError as error:
        raise DataError(str(error)) from error
    except Exception as error:
        # Reading a damaged pickle can raise any error.
        raise DataError(f"{shorten(path)} is damaged, or is not a state file: {shorten(error)}.") from error
