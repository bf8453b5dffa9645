"""Programs in forks: what they print, how they end, and that nothing of one reaches the next."""

import os
import signal
import time

import pytest

from tests.forking import Fork, run


def test_output_arguments_and_codes():
    code = "import sys; print(sys.argv[1:], sys.stdin.read(1)); print('naïve', file=sys.stderr); sys.exit(3)"
    done = run(code, ("-c", "a", "b c"))
    assert (done.returncode, done.stdout, done.stderr) == (3, "['a', 'b c'] \n", "naïve\n")
    failed = run("1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.strip().endswith("ZeroDivisionError: division by zero")


def test_each_is_a_process_of_its_own(monkeypatch, tmp_path):
    code = "import os, sys; print(os.environ.get('SEEN'), os.getcwd(), hasattr(sys, 'left')); sys.left = 1"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEEN", "this")
    assert run(code).stdout == f"this {tmp_path} False\n"
    monkeypatch.delenv("SEEN")
    assert run(code).stdout == f"None {tmp_path} False\n"


def test_a_program_that_ended_before_it_was_waited_for():
    process = Fork("print('there')")
    time.sleep(0.5)
    assert process.wait().stdout == "there\n"


def test_signals_and_the_limit_of_time():
    process = Fork("import time; time.sleep(60)")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30).returncode == -signal.SIGTERM
    with pytest.raises(TimeoutError, match="did not end in"):
        Fork("import time; time.sleep(60)").wait(0.1)
    assert run("print(1)").stdout == "1\n"
