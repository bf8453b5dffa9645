"""Choosing the device of `--device` and `device=`."""

from __future__ import annotations

import torch

from visionattn.errors import InputError, shorten

__all__ = ["find_device"]


def find_device(device: str | torch.device = "auto") -> torch.device:
    """A device that is available.

    Args:
        device: "auto" (a CUDA GPU if available, else the CPU), or a device of PyTorch, such as "cpu" or "cuda:1".

    Raises:
        InputError: The device is not available, or cannot hold values.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = shorten(str(error).partition("\n")[0], 200).rstrip(".")
        raise InputError(f"The device {shorten(device)!r} cannot be used: {reason}.") from error
    return found
