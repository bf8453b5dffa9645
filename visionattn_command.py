"""The console script `visionattn`: it says its version without PyTorch, and hands all else to `visionattn.cli`."""

from __future__ import annotations

import sys
from importlib.metadata import version

__all__ = ["main"]


def main() -> int:
    """Run the command of `sys.argv`.

    Returns:
        The exit code (see `visionattn.cli.main`).
    """
    if sys.argv[1:] == ["--version"]:
        print(f"visionattn {version('visionattn')}")
        return 0
    from visionattn.cli import main as run

    return run()
