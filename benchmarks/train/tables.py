"""The documentation's tables of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows

COLUMNS = {
    # glibc's malloc as it is, and with freed memory kept, one row per model
    "allocator": {
        "model": "model",
        "work": "work",
        "CPU s per step, default": "seconds_default",
        "memory kept": "seconds_kept",
        "ratio": "ratio",
        "peak MiB, default": "mib_default",
        "peak MiB, memory kept": "mib_kept",
    },
    # fine-tuning compared with k-NN, one row per seed
    "finetune_folder": {
        "seed": "seed",
        "k-NN, %": "knn_accuracy",
        "fine-tuned, %": "tuned_accuracy",
        "p": "p",
        "seconds": "seconds",
        "pixels": "pixels",
        "device": "device",
    },
    # two trainers, one row per seed
    "timm_train": {
        "trainer": "trainer",
        "epochs": "epochs",
        "seed": "seed",
        "accuracy, %": "accuracy",
        "seconds": "seconds",
        "CPU seconds": "cpu_seconds",
        "threads": "threads",
        "device": "device",
    },
}
"""Name of a CSV file -> heading -> column."""


def _table(name: str) -> str:
    rows, columns = read_rows(RESULTS / f"{name}.csv"), COLUMNS[name]
    if not rows:
        return "Not measured yet.\n"
    return markdown(list(columns), ([row.get(key, "") for key in columns.values()] for row in rows))


TABLES: dict[str, Callable[[], str]] = {name: partial(_table, name) for name in COLUMNS}
