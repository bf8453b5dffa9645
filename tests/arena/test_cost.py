"""Costs: efficiency length against CAB's numbers, memory, grids that are left out."""

import math

import pytest
import torch

from visionattn.arena import cost
from visionattn.arena.plan import Plan

CPU = torch.device("cpu")
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
# CAB's measurements of attention and of its ABC: milliseconds, MiB.
TIME = [472, 628, 721, 981, 3670, 18437], [648, 590, 602, 910, 1006, 1509]
MEMORY = [81, 265, 952, 3604, 14020, 55300], [42, 80, 156, 308, 612, 1220]


def test_efficiency_length_of_the_authors():
    assert cost.efficiency_length(LENGTHS, *MEMORY) == pytest.approx(69.50664116358462, rel=1e-9)
    assert cost.efficiency_length(LENGTHS, *TIME, first=1) == pytest.approx(1877.2584376535938, rel=1e-9)


def test_efficiency_length_where_there_is_none():
    n = [100.0, 200.0, 300.0, 400.0]
    square = [x * x for x in n]
    assert cost.efficiency_length(n, square, [200 * x for x in n]) == pytest.approx(200)
    assert math.isnan(cost.efficiency_length(n, [-x for x in square], n))
    assert math.isnan(cost.efficiency_length(n, square, [-1e6 + x for x in n]))
    assert math.isnan(cost.efficiency_length(n[:2], square[:2], n[:2]))


def test_peak_memory_is_what_lives_at_a_time():
    def call():
        x = torch.ones(1000, 100)
        for _ in range(3):
            x = x + 1
        return x

    assert cost.peak_memory(call, CPU) == pytest.approx(2 * 400_000, abs=64)  # scalars


def test_numbers_of_a_mixer():
    found = cost.run("window", [7, 14], Plan(rounds=2), CPU)
    values = {(entry.measure, entry.setting): entry.value for entry in found}
    assert values["own parameters", ""] == 0
    assert values["M MACs", "N=196"] == pytest.approx((4 * 196 * 192**2 + 2 * 196 * 49 * 192) / 1e6)
    assert values["ms", "N=49"] > 0
    assert {setting for measure, setting in values if measure == "MiB"} == {"N=49", "N=196"}


def test_slow_and_large_grids_are_left_out(monkeypatch):
    def settings(name, plan):
        return {entry.setting for entry in cost.run(name, [7, 14], plan, CPU)}

    assert settings("lssa", Plan(rounds=1, slowest=0)) == {"", "N=49"}
    assert settings("softmax", Plan(rounds=1, slowest=0)) == {"", "N=49", "N=196"}
    monkeypatch.setattr(cost, "_memory", lambda device: 0.0)
    assert settings("softmax", Plan(rounds=1)) == {"", "N=49"}
