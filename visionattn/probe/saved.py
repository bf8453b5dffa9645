"""Opening the files of tensors that a probing run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visionattn.errors import DataError, VisionAttnError, shorten
from visionattn.weights import check_archive

__all__ = ["read_state"]


def read_state(path: str | Path) -> Any:
    """Read what `visionattn.files.write_state` wrote: tensors on the CPU and plain values.

    Raises:
        DataError: The file is missing, not such a file, or damaged, if only by a bit.
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
        # A damaged pickle fails in any way that its reader's bookkeeping can.
        raise DataError(f"{shorten(path)} is damaged, or holds something else: {shorten(error)}.") from error
