"""The command `visionattn`."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import inspect
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import visionattn
from visionattn import models
from visionattn.checkpoints import create
from visionattn.cost import count_macs, count_parameters
from visionattn.errors import InputError, UnknownNameError, VisionAttnError, require, shorten

LONGEST_MESSAGE = 1000  # characters of an error, on one line
TERMINATED = 128 + signal.SIGTERM
TRAINING = {
    "fit": "train a model by a recipe",
    "validate": "measure a checkpoint on the validation images",
    "test": "measure a checkpoint on the test images",
    "predict": "write a checkpoint's predictions",
}


def _outline(name: str) -> nn.Module:
    """A model without memory."""
    if name in models.names():
        return create(name, device="meta")
    with torch.device("meta"):
        return create(name)


def _facts(name: str) -> dict[str, str]:
    """What the zoo's table says of a model."""
    model: Any = _outline(name)
    config = model.pretrained_cfg
    size = tuple(config["input_size"])
    images = [size] * len(getattr(model, "input_names", ("image",)))
    return {
        "task": getattr(model, "task", "classify" if model.num_classes else "features"),
        "parameters": f"{count_parameters(model) / 1e6:.2f} M",
        "MACs": f"{count_macs(model, *images) / 1e6:,.1f} M",
        "input": " x ".join(map(str, size)),
        "weights": config.get("tag", "published")
        if config.get("url") or config.get("file") or config.get("hf_hub_id")
        else "none",
    }


def _list(args: argparse.Namespace, console: Console) -> None:
    names = fnmatch.filter(models.names(), f"*{args.pattern}*")
    if not names:
        raise UnknownNameError(f"No model name fits {args.pattern!r}. `visionattn list` shows all.")
    table = Table("name", box=SIMPLE_HEAD, pad_edge=False)
    for key in _facts(names[0]):
        table.add_column(key, justify="right" if key in ("parameters", "MACs") else "left", no_wrap=True)
    stderr = Console(stderr=True)
    for name in track(names, "Counting", console=stderr, transient=True, disable=not stderr.is_terminal):
        table.add_row(name, *_facts(name).values())
    console.print(table)


def _show(args: argparse.Namespace, console: Console) -> None:
    if os.path.isfile(args.name):
        raise InputError(f"{shorten(args.name)} is a file: show takes the name of a model.")
    model: Any = _outline(args.name)
    config = model.pretrained_cfg
    documentation = inspect.getdoc(type(model)) or ""
    table = Table(title=args.name, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("what", documentation.split("\n\n")[0].replace("\n", " "))
    name = args.name.split(".")[0]
    if variant := getattr(sys.modules[type(model).__module__], name, None):
        table.add_row("variant", inspect.getdoc(variant) or "")
    for key, value in _facts(args.name).items():
        table.add_row(key, value)
    table.add_row("mean, std", f"{tuple(config['mean'])}, {tuple(config['std'])}")
    multiple = getattr(model, "size_multiple", None)
    sizes = "not stated" if multiple is None else f"any multiple of {multiple}"
    table.add_row("image sizes", "fixed" if config.get("fixed_input_size") else sizes)
    if papers := [str(config[key]) for key in ("paper_name", "paper_ids") if config.get(key)]:
        table.add_row("paper", ", ".join(papers))
    table.add_row("licence", str(config.get("license") or "not stated"))
    table.add_row("in Python", f'import timm, visionattn; timm.create_model("{args.name}")')
    table.add_row("to ONNX", f"visionattn export {args.name} --output model.onnx")
    console.print(table)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{shorten(message, LONGEST_MESSAGE // 2).rstrip('.')}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="visionattn", description="Vision models built from efficient attention.")
    parser.add_argument("--version", action="version", version=f"visionattn {visionattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    quickstart = commands.add_parser("quickstart", help="see it all in three minutes, nothing is downloaded")
    quickstart.add_argument("stations", nargs="*", help="stations to visit (default: all)")
    quickstart.add_argument("--output", type=Path, default=Path("visionattn-quickstart"), help="folder for the results")
    zoo = commands.add_parser("list", help="show the models")
    zoo.add_argument("pattern", nargs="?", default="*", help="part of a name, or a pattern with *")
    show = commands.add_parser("show", help="show one model's card")
    show.add_argument("name")
    export = commands.add_parser("export", help="write a checked ONNX file")
    from visionattn.export import cli as export_cli

    export_cli.add_arguments(export)
    upscale = commands.add_parser("upscale", help="enlarge pictures and videos")
    from visionattn.predict import upscale_cli

    upscale_cli.add_arguments(upscale)
    stereo = commands.add_parser("stereo", help="disparity, depth and point clouds of stereo pairs")
    from visionattn.predict import stereo_cli

    stereo_cli.add_arguments(stereo)
    flow = commands.add_parser("flow", help="optical flow between images, or along a video")
    from visionattn.predict import flow_cli

    flow_cli.add_arguments(flow)
    index = commands.add_parser("index", help="prepare a folder of images for search")
    search = commands.add_parser("search", help="find images like one, by attributes such as colour")
    from visionattn.search import cli as search_cli

    search_cli.add_index_arguments(index)
    search_cli.add_search_arguments(search)
    evaluate = commands.add_parser("evaluate", help="measure models by their benchmark's protocol")
    from visionattn.evaluate import cli as evaluate_cli

    evaluate_cli.add_arguments(evaluate)
    probe = commands.add_parser("probe", help="judge a frozen backbone by heads that read its tokens")
    from visionattn.probe import cli as probe_cli

    probe_cli.add_arguments(probe)
    for name, description in TRAINING.items():
        commands.add_parser(name, help=description, add_help=False)
    return parser


def _run(argv: list[str]) -> int:
    # Lightning's parser knows the options of training commands; ours only lists the commands.
    if argv and argv[0] in TRAINING:
        for package in ("lightning", "jsonargparse"):
            require(package, "train")
        from visionattn.train import cli as train_cli

        return train_cli.main(argv)
    args = _parser().parse_args(argv)
    # A pipe has no width; rows must not be cut there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.command == "list":
        _list(args, console)
    elif args.command == "show":
        _show(args, console)
    elif args.command == "export":
        from visionattn.export import cli as export_cli

        return export_cli.run(args)
    elif args.command == "upscale":
        from visionattn.predict import upscale_cli

        return upscale_cli.run(args)
    elif args.command == "stereo":
        from visionattn.predict import stereo_cli

        return stereo_cli.run(args)
    elif args.command == "flow":
        from visionattn.predict import flow_cli

        return flow_cli.run(args)
    elif args.command in ("index", "search"):
        from visionattn.search import cli as search_cli

        return search_cli.run_index(args) if args.command == "index" else search_cli.run_search(args)
    elif args.command == "evaluate":
        from visionattn.evaluate import cli as evaluate_cli

        return evaluate_cli.run(args)
    elif args.command == "probe":
        from visionattn.probe import cli as probe_cli

        return probe_cli.run(args)
    else:
        from visionattn import quickstart

        quickstart.run(args.output, args.stations, console)
    return 0


class _Terminated(BaseException):
    """SIGTERM arrived: what is half-written is cleaned up on the way out."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM in this process raise an exception, so that temporary files are removed; forked ones just end."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    process = os.getpid()

    def terminate(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            os._exit(TERMINATED)
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepare_streams() -> None:
    """Standard streams that may be closed, or may not know all letters of a file name."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get the number, and what native code prints would land in it.
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when all went well, 1 when a batch went on past failures, 2 for a mistake of the user or a fault of the
        machine (a full disk, no memory), told on one line, 130 after Ctrl-C, 143 after SIGTERM.
    """
    _prepare_streams()
    try:
        with _sigterm_raises():
            code = _run(sys.argv[1:] if argv is None else argv)
        message = None
    except BrokenPipeError:
        code, message = 1, None  # the reader of a pipe has seen enough
    except VisionAttnError as error:
        code, message = 2, shorten(error, LONGEST_MESSAGE)
    except OSError as error:
        reason = error.strerror or shorten(error, LONGEST_MESSAGE // 2) or type(error).__name__
        # Without a name it is a stream that is open already.
        where = shorten(error.filename) if error.filename else "standard output, or an open file"
        code, message = 2, f"{where}: {reason.rstrip('.')}."
    except ModuleNotFoundError as error:
        code, message = 2, f"This needs the package {error.name!r}. Install it with: pip install 'visionattn[all]'"
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        code, message = 2, "There is not enough memory for this."
    except KeyboardInterrupt:
        code, message = 130, "stopped."
    except _Terminated:
        code, message = TERMINATED, "stopped by SIGTERM."
    broken = _flush(sys.stdout)
    if broken and not isinstance(broken, BrokenPipeError):
        # What failed may have been this output itself.
        code, message = 2, f"Could not write to standard output: {broken.strerror}."
    elif broken and code == 0:
        code = 1
    if message is not None:
        with contextlib.suppress(OSError):
            print(f"visionattn: {message}", file=sys.stderr)
    _flush(sys.stderr)
    return code


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether PyTorch found no memory: on a CPU it says so in a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _flush(stream: TextIO) -> OSError | None:
    """Write what is still buffered; if that fails, let Python not try again, and complain, when it ends."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
