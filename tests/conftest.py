"""Every test starts from the same random state, on one thread: the suite shares two cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def pytest_configure():
    torch.set_num_threads(1)
