"""A public block without a contract fails here."""

import importlib
from pathlib import Path

import visionattn.blocks
from tests.blocks.contract import BlockContract


def test_every_block_has_a_contract():
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.blocks.{path.stem}")
    held = {contract.block for contract in BlockContract.__subclasses__()}
    assert [name for name in visionattn.blocks.__all__ if getattr(visionattn.blocks, name) not in held] == []
