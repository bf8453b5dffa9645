"""The console script: how the process begins and ends."""

import gc
import os
import subprocess
import sys

import pytest

import visionattn_command
from tests.forking import run


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of `os._exit`, which does not end this process."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.delattr(sys, "last_type", raising=False)
    return codes


def test_collection_is_paused_and_goes_on():
    assert gc.isenabled()
    with pytest.raises(ImportError), visionattn_command.paused_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with visionattn_command.paused_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_process_ends_with_the_commands_code(ended, code):
    visionattn_command._leave(os.getpid(), [code])
    assert ended == [code]


def test_python_ends_other_processes_and_failures(ended, monkeypatch):
    visionattn_command._leave(os.getpid() + 1, [0])  # a forked process that runs the parent's functions
    visionattn_command._leave(os.getpid(), [])  # an exception during the command
    monkeypatch.setattr(sys, "last_type", ValueError, raising=False)  # an exception after the command
    visionattn_command._leave(os.getpid(), [0])
    assert ended == []


def test_closed_streams(ended, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    visionattn_command._leave(os.getpid(), [0])
    assert ended == [0]


def test_what_runs_at_exit_has_run_before():
    """Python's own end is left out: it would call __del__ of an object that lives as long as the module."""
    code = (
        "import atexit, sys; sys.argv[1:] = ['show', 'nothing']; import visionattn_command\n"
        "class Kept:\n    def __del__(self): print('freed')\n"
        "kept = Kept(); code = visionattn_command.main(); atexit.register(print, 'at exit'); sys.exit(code)"
    )
    done = run(code)
    assert (done.returncode, done.stdout) == (2, "at exit\n")
    assert done.stderr.startswith("visionattn: There is no model 'nothing'.")


def test_as_a_module():
    """torchrun starts `-m visionattn_command`."""
    done = subprocess.run(
        [sys.executable, "-m", "visionattn_command", "show", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("visionattn: There is no model 'nothing'.")
