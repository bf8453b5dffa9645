"""Freed memory that stays with the process, for training on a CPU.

glibc returns large freed blocks to the system at once, so that each training step takes page faults for all of its
activations again. `benchmarks/train/allocator.py` measures what it costs.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc's malloc reuse freed blocks of any size instead of returning them to the system.

    The setting holds for the process and the ones it forks, and cannot be undone. Other C libraries (musl, macOS,
    Windows) are left alone, and so are allocators that the user has set up: by a variable `MALLOC_*`, by `glibc.malloc`
    in `GLIBC_TUNABLES`, or by preloading another malloc.

    Returns:
        Whether malloc accepted it.
    """
    if not _is_glibc() or _is_set_up():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Without M_MMAP_MAX, blocks above 32 MiB, the highest M_MMAP_THRESHOLD, would still be mapped one by one.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # no such function, or no such name
        return False


def _is_set_up() -> bool:
    """Whether the user chose settings of malloc, or another malloc such as jemalloc or tcmalloc."""
    return (
        any(name.startswith("MALLOC_") for name in os.environ)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
        or "malloc" in os.environ.get("LD_PRELOAD", "")
    )
