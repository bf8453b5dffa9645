"""A log has a line with an estimate now and then, a terminal has bars."""

import io
import time

from rich.console import Console

from visionattn.probe.progress import LoggedProgress, show_progress


def test_a_log_has_a_line_every_30_seconds(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    output = io.StringIO()
    with show_progress(Console(file=output, width=160)) as progress:
        assert isinstance(progress, LoggedProgress)
        bar = progress.add_task("tokens", total=6000, completed=1000)
        for _ in range(10):
            now[0] += 7
            progress.advance(bar, 100)
    # 1500 after 35 s, 2000 after 70 s.
    lines = output.getvalue().splitlines()
    assert lines == ["tokens: 1,500 of 6,000 (25%), about 5 min left", "tokens: 2,000 of 6,000 (33%), about 5 min left"]


def test_a_terminal_has_bars():
    with show_progress(Console(file=io.StringIO(), force_terminal=True)) as progress:
        assert not isinstance(progress, LoggedProgress)
