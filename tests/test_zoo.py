"""The table of costs that `visionattn list` shows: every name, and what counting gives."""

import random
import subprocess
import sys

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


def test_input_and_weights():
    for name, cost in COSTS.items():
        config = timm.get_pretrained_cfg(name)
        assert cost.input == " x ".join(map(str, config.input_size)), HINT
        expected = "shipped" if config.file else "download" if config.url or config.hf_hub_id else "none"
        assert cost.weights == expected, HINT
    assert {cost.weights for cost in COSTS.values()} == {"shipped", "download", "none"}


def test_the_console_script_lists_without_pytorch(capsys):
    code = "import sys; sys.argv[1:] = {}; import visionattn_command; code = visionattn_command.main(); "
    code += "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    for words in (["list"], ["list", "nano*minimum"]):
        run = subprocess.run([sys.executable, "-c", code.format(words)], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "False\n")
        assert cli.main(words) == 0
        assert run.stdout == capsys.readouterr().out
    run = subprocess.run([sys.executable, "-c", code.format(["list", "resnet"])], capture_output=True, text=True)
    assert run.returncode == 2
    assert "No model name fits 'resnet'" in run.stderr


def test_a_name_that_a_user_registers(capsys, monkeypatch):
    monkeypatch.setattr("visionattn.zoo.read_costs", dict)
    assert cli.main(["list", "vit_nano_patch7_28_minimum"]) == 0
    assert "0.03 M" in capsys.readouterr().out
