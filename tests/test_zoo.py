"""The table of costs that `visionattn list` shows: every name, and what counting gives."""

import random

import pytest
import timm

from visionattn import models
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
