"""Every test starts from the same random state, on one thread: the suite shares two cores."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def pytest_configure():
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
