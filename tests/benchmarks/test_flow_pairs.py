"""Flow of networks and rivals: what is known is measured, and each way points from the first image to the second."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("cv2")
pytest.importorskip("skimage")

from benchmarks.shipped import measures
from benchmarks.stereo import flow_pairs
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
    ((above, _, down),) = motorcycle(transposed=True)
    assert np.array_equal(above, left.transpose(1, 0, 2))
    assert np.array_equal(down, truth[..., ::-1].transpose(1, 0, 2), equal_nan=True)
    first, second, flow = next(generated(1, []))
    assert first.shape == second.shape == (256, 448, 3)
    assert flow.shape == (256, 448, 2)
    assert np.isfinite(flow).all()
    assert np.ptp(flow[..., 1]) > 1


def test_shipped_weights_stand_next_to_the_rivals(monkeypatch):
    monkeypatch.setattr(measures, "FLOW_PAIRS", 1)
    monkeypatch.setattr(flow_pairs, "SIZE", (192, 224))
    monkeypatch.setattr(flow_pairs, "motorcycle", lambda transposed=False: generated(1, []))
    rows = measures.flow("va_match_flow_nano")
    assert [row.method for row in rows[::2]] == [*RIVALS, "va_match_flow_nano"] * 3
    assert [row.metric for row in rows[:2]] == [measures.EPE, measures.BAD_2]
    assert list(dict.fromkeys(row.data for row in rows)) == [
        "1 generated, procedural textures",
        "motorcycle",
        "motorcycle, transposed",
    ]
    assert rows[6].value < rows[0].value  # than without motion
