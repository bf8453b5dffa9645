"""`visionattn export [BACKBONE] --head FILE --output F.onnx`: a saved head with its backbone as one ONNX file."""

from __future__ import annotations

import argparse

from visionattn.errors import InputError
from visionattn.export import cli
from visionattn.probe.network import head_network

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Run the command with the arguments of `visionattn.export.cli`.

    Raises:
        VisionAttnError: The head cannot be used, an option does not apply to it, or the export failed.
    """
    for option in ("num_classes", "image_size", "random_weights"):
        if getattr(args, option):
            raise InputError(f"The head states its classes and image size: leave out --{option.replace('_', '-')}.")
    args.model = head_network(args.head, backbone=args.model, checkpoint=args.checkpoint)
    args.checkpoint = None
    return cli.run(args)
