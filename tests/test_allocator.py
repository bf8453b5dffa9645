"""Freed memory that stays with the process."""

import os
import subprocess
import sys

import pytest

from visionattn import allocator

ON_GLIBC = allocator._is_glibc()
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")

# Frees a block of 256 MiB, which glibc returns to the system by itself. The module runs without its package, whose
# import takes seconds.
PROGRAM = """
import ctypes, re, runpy
from pathlib import Path
keep_freed_memory = runpy.run_path({file!r})["keep_freed_memory"]

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

if {keep}:
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resident()
for _ in range(4):
    block = libc.malloc(ctypes.c_size_t(2**28))
    ctypes.memset(block, 1, 2**28)
    libc.free(block)
print(resident() - before)
"""


def kept(keep: bool) -> int:
    """MiB that stay with a process after it has freed a block of 256 MiB for the fourth time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    command = [sys.executable, "-c", PROGRAM.format(file=allocator.__file__, keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.skipif(not ON_GLIBC, reason="the C library is not glibc")
def test_a_freed_block_stays_and_is_used_again():
    assert kept(False) < 16
    assert 240 < kept(True) < 300  # one block, not four


class Recorder:
    """Stands for the C library."""

    def __init__(self, answer: int = 1) -> None:
        self.calls: list[tuple[int, int]] = []
        self.answer = answer

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return self.answer


@pytest.fixture
def library(monkeypatch):
    """A C library that says it is glibc, in an environment that sets up no allocator."""
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    found = Recorder()
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: found)
    return found


def test_the_parameters_of_malloc(library):
    assert allocator.keep_freed_memory()
    assert library.calls == [(-4, 0), (-1, -1)]


def test_malloc_can_refuse(library):
    library.answer = 0
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_ARENA_MAX", "2"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_CONF", "dirty_decay_ms:1000"),  # jemalloc's
        ("GLIBC_TUNABLES", "glibc.rtld.nns=4:glibc.malloc.mmap_threshold=65536"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
        ("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4"),
        ("LD_PRELOAD", "/usr/lib/libmimalloc.so"),
    ],
)
def test_a_users_allocator_is_left_alone(library, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not allocator.keep_freed_memory()
    assert library.calls == []


@pytest.mark.parametrize(("name", "value"), [("GLIBC_TUNABLES", "glibc.rtld.nns=4"), ("LD_PRELOAD", "libdebug.so")])
def test_other_settings_are_not_about_malloc(library, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory()


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_other_c_libraries(library, monkeypatch, error):
    def confstr(name: str) -> str:
        raise error("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    assert not allocator.keep_freed_memory()
    assert library.calls == []


def test_windows_has_no_confstr(library, monkeypatch):
    monkeypatch.delattr(os, "confstr")
    assert not allocator.keep_freed_memory()
    assert library.calls == []
