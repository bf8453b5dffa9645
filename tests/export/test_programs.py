"""The how-to's snippets on programs of torch.export, the second one in a process that cannot import visionattn."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "export.md"


def test_a_program_runs_without_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = HOW_TO.read_text().split("## Programs of torch.export")[1]
    writing, loading = (block.split("```")[0] for block in section.split("```python\n")[1:3])
    scope: dict = {}
    exec(writing, scope)
    torch.save((scope["images"], scope["model"](scope["images"])), "expected.pt")
    check = """
images, expected = torch.load("expected.pt")
torch.testing.assert_close(program.module()(images), expected)
assert logits.shape == (3, 10)
print("loaded")
"""
    blocked = "import sys; sys.modules['visionattn'] = None\n"  # an import fails
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = blocked + loading + check
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "loaded\n"
