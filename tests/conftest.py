"""Every test starts from the same random state, on one thread: the suite shares two cores."""

import gc
import os
import sys
from pathlib import Path

import pytest

from tests.exporting import hasten_exports

# Files with tests of ten seconds and more, or with fixtures of it. Processes that share the tests begin with them, so
# that what is left at the end is short and none of them waits for the others.
LONG = (
    "fuzz/test_fuzz.py",  # before all others: autograd refuses to run in a fork once the worker has started its threads
    "export/test_onnx.py",
    "docs/test_site.py",
    "docs/test_examples.py",
    "train/test_train_cli.py",
    "train/test_announce.py",
    "train/test_triplets_task.py",
    "train/test_match_task.py",
    "export/test_programs.py",
    "web/test_page.py",
    "kernels/test_halo_attention.py",
    "kernels/test_match_attention.py",
    "kernels/test_multi_query_pool.py",
    "kernels/test_subspace_attention.py",
    "arena/test_api.py",
    "quickstart/test_quickstart.py",
)


@pytest.fixture(autouse=True)
def _reproducible():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exports_are_quick():
    hasten_exports()


def pytest_configure(config):
    # Containers often forbid bytecode: each process would rewrite the asserts of all tests, and compile the package.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
    if not getattr(config.option, "numprocesses", None):  # one that hands tests to others needs no PyTorch
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish():
    """Leave what collection made, half a million objects, out of garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 20)


def pytest_sessionfinish():
    gc.unfreeze()  # so that the interpreter can free what extensions otherwise report as leaked
