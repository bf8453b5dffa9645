"""Every test starts from the same random state, on one thread: the suite shares two cores."""

import functools
import gc
import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exporter_reads_its_translations_once():
    """PyTorch's ONNX exporter parses 500 functions of onnxscript anew in every export: half the time of a small one."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    scripts = getattr(registration, "onnxscript_apis", None)
    if scripts is not None and "get_torchlib_ops" not in vars(scripts):
        scripts.get_torchlib_ops = functools.cache(scripts.get_torchlib_ops)


def pytest_configure():
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


def pytest_collection_finish():
    """Leave what collection made, half a million objects, out of garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 20)
