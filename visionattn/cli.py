"""The command `visionattn`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TextIO

import shtab
import torch

import visionattn
from visionattn.errors import InputError, VisionAttnError, require, shorten
from visionattn.lightning_import import import_lightning
from visionattn_command import paused_collection

LONGEST_MESSAGE = 1000  # maximum length of an error message
TERMINATED = 128 + signal.SIGTERM


class Command(NamedTuple):
    """A command, and the module of its arguments and its implementation."""

    help: str
    module: str
    arguments: str = "add_arguments"
    run: str = "run"


COMMANDS = {
    "quickstart": Command("tour in three minutes, without downloads", "visionattn.quickstart", run="run_command"),
    "list": Command("show the models", "visionattn.zoo", "add_list_arguments", "run_list"),
    "show": Command("show one model's card", "visionattn.zoo", "add_show_arguments", "run_show"),
    "export": Command("write a checked ONNX file", "visionattn.export.cli"),
    "check": Command(
        "check any ONNX file: structure, sizes, phones and browsers, cost", "visionattn.export.inspect.cli"
    ),
    "upscale": Command("upscale images and videos", "visionattn.predict.upscale_cli"),
    "stereo": Command("disparity, depth and point clouds of stereo pairs", "visionattn.predict.stereo_cli"),
    "flow": Command("optical flow between images, or along a video", "visionattn.predict.flow_cli"),
    "index": Command(
        "build a search index of an image folder", "visionattn.search.cli", "add_index_arguments", "run_index"
    ),
    "search": Command(
        "find similar images, by any model or by attributes such as colour",
        "visionattn.search.cli",
        "add_search_arguments",
        "run_search",
    ),
    "duplicates": Command(
        "find near-duplicate images in an index",
        "visionattn.search.cli",
        "add_duplicates_arguments",
        "run_duplicates",
    ),
    "evaluate": Command("evaluate models by their benchmark's protocol", "visionattn.evaluate.cli"),
    "probe": Command("evaluate a frozen backbone by heads on its tokens", "visionattn.probe.cli"),
    "inspect": Command("inspect the attention of a frozen backbone", "visionattn.frozen.cli"),
    "arena": Command("measure attention mechanisms side by side", "visionattn.arena.cli"),
    "demo": Command("serve a page whose models run in the browser", "visionattn.demo.cli"),
}
"""The commands; those of Lightning's parser are in `TRAINING`."""

TRAINING = {
    "fit": "train a model by a recipe",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write a checkpoint's predictions, or those of a probed head (--head)",
}


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{shorten(message, LONGEST_MESSAGE // 2).rstrip('.')}. See {self.prog} --help.")


class _PrintCompletion(argparse.Action):
    """Print a shell completion script for commands, options and files, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        whole = _parser(*COMMANDS)
        _complete_files(whole)
        print(shtab.complete(whole, values))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete arguments that are neither numbers nor choices with file or folder names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                _complete_files(own)
        elif action.choices is None and action.nargs != 0 and action.type in (None, Path):
            completed: Any = action
            completed.complete = shtab.DIRECTORY if action.metavar == "FOLDER" else shtab.FILE


def _parser(*wanted: str) -> argparse.ArgumentParser:
    """The parser of all commands; only the wanted ones are imported, to add their arguments."""
    parser = _Parser(prog="visionattn", description="Vision models built from efficient attention.")
    parser.add_argument("--version", action="version", version=f"visionattn {visionattn.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=shtab.SUPPORTED_SHELLS,
        help="print a completion script for a shell",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help)
        if name in wanted:
            getattr(importlib.import_module(command.module), command.arguments)(own)
    for name, description in TRAINING.items():
        commands.add_parser(name, help=description, add_help=False)
    return parser


def _run(argv: list[str]) -> int:
    if argv[:1] == ["predict"] and any(word.partition("=")[0] == "--head" for word in argv):
        from visionattn.probe import predict_cli

        parser = _Parser(prog="visionattn predict", description="Apply a head of `visionattn probe` to images.")
        predict_cli.add_arguments(parser)
        return predict_cli.run(parser.parse_args(argv[1:]))
    # Lightning's parser has the options of training commands; this one only lists the commands.
    if argv and argv[0] in TRAINING:
        with paused_collection():
            import_lightning()
            require("jsonargparse", "train")
            from visionattn.train import cli as train_cli
        return train_cli.main(argv)
    args = _parser(*argv[:1]).parse_args(argv)
    command = COMMANDS[args.command]
    if args.command == "export" and args.head is not None:
        command = Command(command.help, "visionattn.probe.export_cli")
    return getattr(importlib.import_module(command.module), command.run)(args)


class _Terminated(BaseException):
    """SIGTERM was received: temporary files are removed while it propagates."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise an exception, so that temporary files are removed; forked processes just end."""
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
    """Handle standard streams that are closed, or that cannot encode all characters of a file name."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next opened file would get this descriptor, and output of native code would be written to it.
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
        0 on success, 1 if a batch had failures, 2 for a user error or a system error (a full disk,
        no memory), reported on one line, 130 after Ctrl-C, 143 after SIGTERM.
    """
    _prepare_streams()
    try:
        with _sigterm_raises():
            code = _run(sys.argv[1:] if argv is None else argv)
        message = None
    except BrokenPipeError:
        code, message = 1, None  # the reader closed the pipe
    except VisionAttnError as error:
        code, message = 2, shorten(error, LONGEST_MESSAGE)
    except OSError as error:
        reason = error.strerror or shorten(error, LONGEST_MESSAGE // 2) or type(error).__name__
        # An error without a file name comes from an open stream.
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
        # The output itself may have failed.
        code, message = 2, f"Could not write to standard output: {broken.strerror}."
    elif broken and code == 0:
        code = 1
    if message is not None:
        with contextlib.suppress(OSError):
            print(f"visionattn: {message}", file=sys.stderr)
    _flush(sys.stderr)
    return code


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether PyTorch ran out of memory: on a CPU it raises a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _flush(stream: TextIO) -> OSError | None:
    """Flush a stream; on failure, keep Python from trying again, with a message, at exit."""
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
