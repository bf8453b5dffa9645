"""The options of `upscale`, `stereo` and `flow`: names and defaults are those of the functions that they call."""

import argparse
import inspect

import pytest

import visionattn
from visionattn.predict import flow_cli, stereo_cli, upscale_cli

COMMANDS = {
    "upscale": (upscale_cli, visionattn.upscale, visionattn.upscale_files),
    "stereo": (stereo_cli, visionattn.stereo, visionattn.stereo_files),
    "flow": (flow_cli, visionattn.flow, visionattn.flow_files),
}


def options(module):
    """Name and default of each option; of a positional, None."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    taken = [action for action in parser._actions if action.dest not in ("help", argparse.SUPPRESS)]
    return {action.dest: action.default for action in taken}


def parameters(function):
    found = inspect.signature(function).parameters
    return {name: None if one.default is one.empty else one.default for name, one in found.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_functions_have_the_options_of_their_command(command):
    module, function, for_files = COMMANDS[command]
    expected = options(module)
    assert parameters(for_files) == expected
    own = parameters(function)
    assert {name: own[name] for name in own.keys() & expected} == {
        name: expected[name] for name in own.keys() & expected
    }
    images = {"upscale": {"image"}, "stereo": set(), "flow": {"first", "second"}}[command]
    assert own.keys() - expected.keys() - {"precision"} == images
    of_files = {"inputs", "output", "overwrite", "skip_existing"}
    of_files |= (
        {"compare", "format", "quality"}
        if command == "upscale"
        else {"format", "color", "nonocc", "ply", "principal_point", "right_disparity", "fy"}
    )
    assert expected.keys() - own.keys() <= of_files


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_of_the_type_and_the_device(command):
    found = options(COMMANDS[command][0])
    assert (found["device"], found["dtype"], found["model"], found["checkpoint"]) == ("auto", "auto", None, None)
