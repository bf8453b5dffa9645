"""Progress: a bar on a terminal, lines in a log, nothing where nothing is wanted."""

import io
import sys

import pytest
from rich.console import Console

from visionattn import progress
from visionattn.progress import counted, session_console


@pytest.mark.parametrize(("every", "lines"), [(0, ["3 of 1,000 images", "5 of 1,000 images"]), (1000, [])])
def test_a_log_gets_lines(every, lines, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", every)
    with counted("images", 1000, Console(file=io.StringIO())) as advance:
        advance(3)
        advance(2)
    assert capsys.readouterr().err.splitlines() == lines


def test_nothing_is_shown_without_a_console(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    with counted("images", 10, None) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    screen = io.StringIO()
    with counted("images", 10, Console(file=screen, force_terminal=True, width=80)) as advance:
        advance(4)
    assert "4/10" in screen.getvalue()


def test_a_session_has_a_console_and_a_program_has_none(monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    assert session_console() is None
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert session_console().stderr
