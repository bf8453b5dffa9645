"""What a mixer supports by its own word is what it takes."""

import pytest

from visionattn.arena.matrix import PATTERNS, has_pattern
from visionattn.errors import InputError
from visionattn.mixers import MIXERS


@pytest.mark.parametrize("name", MIXERS)
def test_patterns(name):
    found = {pattern for pattern in PATTERNS if has_pattern(name, pattern)}
    said = {feature.replace("any_grid", "any grid") for feature in MIXERS[name].supports} & set(PATTERNS)
    assert found == said | {"self"}


def test_unknown_pattern():
    with pytest.raises(InputError, match=r"must be one of 'self', 'cross', .*; got 'causal'"):
        has_pattern("hsa", "causal")
