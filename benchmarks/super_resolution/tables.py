"""The documentation's tables of super-resolution."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import plain

TABLES: dict[str, Callable[[], str]] = {
    "span_psnr": lambda: plain("span_psnr"),
    "span_speed": lambda: plain("span_speed", ratio="speed-up"),
    "upscale_memory": lambda: plain("upscale_memory"),
}
