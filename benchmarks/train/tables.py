"""The documentation's tables of training."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows


def _table(name: str, columns: dict[str, str]) -> str:
    rows = read_rows(RESULTS / f"{name}.csv")
    if not rows:
        return "Not measured yet.\n"
    return markdown(list(columns), ([row.get(key, "") for key in columns.values()] for row in rows))


def finetune_folder() -> str:
    """Fine-tuning compared with k-NN, one row per seed."""
    columns = {
        "seed": "seed",
        "k-NN, %": "knn_accuracy",
        "fine-tuned, %": "tuned_accuracy",
        "p": "p",
        "seconds": "seconds",
        "pixels": "pixels",
        "device": "device",
    }
    return _table("finetune_folder", columns)


def timm_train() -> str:
    """Two trainers, one row per seed."""
    columns = {
        "trainer": "trainer",
        "epochs": "epochs",
        "seed": "seed",
        "accuracy, %": "accuracy",
        "seconds": "seconds",
        "CPU seconds": "cpu_seconds",
        "threads": "threads",
        "device": "device",
    }
    return _table("timm_train", columns)


def allocator() -> str:
    """glibc's malloc as it is, and with freed memory kept, one row per model."""
    columns = {
        "model": "model",
        "work": "work",
        "CPU s per step, default": "seconds_default",
        "memory kept": "seconds_kept",
        "ratio": "ratio",
        "peak MiB, default": "mib_default",
        "peak MiB, memory kept": "mib_kept",
    }
    return _table("allocator", columns)


TABLES: dict[str, Callable[[], str]] = {
    "allocator": allocator,
    "finetune_folder": finetune_folder,
    "timm_train": timm_train,
}
