"""The table of costs that `visionattn list` shows: every name, and what counting gives."""

import random

import pytest
import timm

from visionattn import cli, models
from visionattn.cost import count_parameters
from visionattn.zoo import count, read_costs

COSTS = read_costs()
HINT = "python -m tools.count_costs writes the table anew"


def test_every_name_has_a_row():
    assert list(COSTS) == models.names(), HINT


# The contract of classifiers holds the parameters of all others against the table.
@pytest.mark.parametrize("name", [name for name, cost in COSTS.items() if cost.task != "classify"])
def test_parameters(name):
    model = timm.create_model(name, device="meta")
    assert COSTS[name].parameters == count_parameters(model), HINT


@pytest.mark.parametrize("name", random.Random(0).sample(models.names(), 6))
def test_costs(name):
    assert COSTS[name] == count(name), HINT


def test_a_name_that_a_user_registers(capsys, monkeypatch):
    monkeypatch.setattr("visionattn.zoo.read_costs", dict)
    assert cli.main(["list", "vit_nano_patch7_28_minimum"]) == 0
    assert "0.03 M" in capsys.readouterr().out
