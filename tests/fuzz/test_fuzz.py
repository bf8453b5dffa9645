"""A fixed number of damaged inputs of each kind: one clear line or a valid result, nothing left behind, no hang."""

import os
import re
from random import Random

import pytest

from tests.fuzz import mutate, surfaces
from tests.fuzz.mutate import damaged_bytes, damaged_text, damaged_value
from tests.fuzz.running import _fault, _in_child, cases
from tests.fuzz.surfaces import SURFACES
from visionattn.errors import DataError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forked processes")


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_surface(surface, tmp_path):
    results = list(cases(surface, tmp_path, 0, range(surface.cases)))
    assert {result.number: result.fault for result in results if result.fault} == {}
    assert {result.code for result in results} <= {0, 1, 2}


@pytest.mark.parametrize("surface", SURFACES[:-1], ids=lambda surface: surface.name)
def test_good_examples_are_read(surface, tmp_path, monkeypatch):
    for module in (mutate, surfaces):
        for name in ("damaged_bytes", "damaged_value"):
            monkeypatch.setattr(module, name, lambda rng, value: value)
        monkeypatch.setattr(module, "damaged_text", lambda rng, text, separator: text)
    assert [result.code for result in cases(surface, tmp_path, 0, range(3))] == [0, 0, 0]


def test_damage_is_repeatable_and_damages():
    for damage in (
        lambda rng: damaged_bytes(rng, bytes(range(256))),
        lambda rng: damaged_text(rng, "a,b\nc,d", ","),
        lambda rng: str(damaged_value(rng, {"a": [1, {"b": 2}], "c": 3})),
    ):
        results = [damage(Random(seed)) for seed in range(50)]
        assert results == [damage(Random(seed)) for seed in range(50)]
        assert len(set(results)) > 25


def refuse(message):
    def call():
        raise DataError(message)

    return call


def leave(name):
    return lambda: open(name, "w").close()


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda: None, None),
        (lambda: 2 * bool(os.write(2, b"visionattn: no.\n")), None),
        (refuse("It is damaged."), None),
        (refuse("x" * 10**4), "an error of 10013 characters"),
        (refuse("two\nlines"), "not one line"),
        (lambda: 1 // 0, "no VisionAttnError: Traceback"),
        (lambda: 3, "exit code 3"),
        (lambda: os.abort(), "killed by SIGABRT"),
        (lambda: bytearray(2**40), "no VisionAttnError: .*MemoryError"),
        (leave(".visionattn-1"), "left behind: .visionattn-1"),
    ],
)
def test_what_is_a_fault(tmp_path, call, fault):
    folder = tmp_path / "case"
    folder.mkdir()
    found = _fault(*_in_child(call, folder), folder)
    if fault is None:
        assert found is None
    else:
        assert re.search(fault, found, re.DOTALL)
