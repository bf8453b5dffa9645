"""Programs in forks of a process that has imported timm, and with it PyTorch: the longest part of most of their starts.

What a program measures or changes stays its own, as in a new interpreter. One that is about the start itself, or about
a missing package that timm imports, needs a new one.
"""

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, timm
for line in sys.stdin:
    code, sys.argv, folder, variables, output = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        for number, name in enumerate([os.devnull, output + ".out", output + ".err"]):
            file = os.open(name, os.O_RDWR)
            os.dup2(file, number)
            os.close(file)
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
exec(compile(code, sys.argv[0], "exec"))
"""


@functools.cache
def _server(**variables: str) -> subprocess.Popen:
    command = [sys.executable, "-c", _SERVER]
    pipe = subprocess.PIPE
    # Unbuffered: select would not see a line that an earlier reading took along.
    server = subprocess.Popen(command, env=_environment(variables), stdin=pipe, stdout=pipe, bufsize=0)
    atexit.register(server.communicate)  # ends it, as its input ends
    return server


def _environment(variables: dict[str, str]) -> dict[str, str]:
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Fork:
    """A program that runs.

    Args:
        code: The program.
        arguments: `sys.argv`, of which the first stands for the program's file.
        variables: Environment variables that the first process has too, so that what it imports can read them.
    """

    def __init__(self, code: str, arguments: tuple[str, ...] = ("-c",), **variables: str) -> None:
        self._server = _server(**variables)
        self._folder = tempfile.TemporaryDirectory()
        self._output = f"{self._folder.name}/output"
        for suffix in (".out", ".err"):
            Path(self._output + suffix).touch()  # a signal may end the program before it opens them
        request = [code, arguments, os.getcwd(), _environment(variables), self._output]
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid = int(self._read(120))

    def _read(self, seconds: float) -> bytes:
        if not select.select([self._server.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"The program did not end in {seconds} s.")
        return self._server.stdout.readline()

    def wait(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """Give the exit code, which is negative after a signal, and what was printed."""
        try:
            code = int(self._read(seconds))
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            self._read(60)
            raise
        out, err = (Path(self._output + suffix).read_text() for suffix in (".out", ".err"))
        self._folder.cleanup()
        return subprocess.CompletedProcess((), code, out, err)


def run(code: str, arguments: tuple[str, ...] = ("-c",), **variables: str) -> subprocess.CompletedProcess:
    return Fork(code, arguments, **variables).wait()
