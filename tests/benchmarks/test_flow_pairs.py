"""Flow of networks and rivals: what is known is measured, and each way points from the first image to the second."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("cv2")
pytest.importorskip("skimage")

from benchmarks.stereo.flow_pairs import RIVALS, by_network, generated, measure, motorcycle


def test_rivals_find_a_shift():
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (40, 50, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    first, second = large[8:136, 8:168], large[11:139, 3:163]  # a point at (x, y) of the first moves by (5, -3)
    truth = np.broadcast_to(np.float32([5, -3]), (128, 160, 2))
    found = measure(iter([(first, second, truth)]), RIVALS)
    assert found["no motion"]["epe"] == pytest.approx(34**0.5)
    assert found["DIS"]["bad_1"] < 10
    assert found["Farneback"]["bad_1"] < 20


def test_a_network_is_asked_for_the_way_forward():
    class Half(nn.Module):
        def forward(self, first, second):
            return torch.cat([first[:, :2], second[:, :2]], 1)

    first, second = np.full((4, 6, 3), 255, np.uint8), np.zeros((4, 6, 3), np.uint8)
    assert np.array_equal(by_network(Half())(first, second), np.ones((4, 6, 2), np.float32))


def test_pairs_with_ground_truth():
    ((left, _, truth),) = motorcycle()
    known = np.isfinite(truth[..., 0])
    assert left.shape == (500, 741, 3)
    assert known.mean() == pytest.approx(0.927, abs=0.001)
    assert (np.isfinite(truth[..., 1]) == known).all()
    assert -60 < truth[known][:, 0].min() < truth[known][:, 0].max() < -7
    first, second, flow = next(generated(1, []))
    assert first.shape == second.shape == (256, 448, 3)
    assert flow.shape == (256, 448, 2)
    assert np.isfinite(flow).all()
    assert np.ptp(flow[..., 1]) > 1
