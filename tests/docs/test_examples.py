"""The examples of the front page and the reference run: those of a page in their order, as a reader types them."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from visionattn import blocks
from visionattn.cli import COMMANDS, TRAINING, main
from visionattn.kernels import decompositions

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "index.md", *sorted((DOCS / "reference").glob("*.md")))
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "$ visionattn "


def examples(path):
    """Language and code of a page's examples; empty lines before it give errors the page's line numbers."""
    page = path.read_text()
    for found in BLOCK.finditer(page):
        yield found[1], "\n" * page.count("\n", 0, found.start(2)) + textwrap.dedent(found[2])


def run(code):
    for line in code.splitlines():
        if line.startswith(PROMPT):
            assert main(shlex.split(line.removeprefix(PROMPT))) == 0, line


@pytest.mark.parametrize("path", [path for path in PAGES if any(examples(path))], ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for language, code in examples(path):
        if language == "console":
            run(code)
        else:
            exec(compile(code, str(path), "exec"), scope)


def test_every_block_operator_and_command_has_an_example():
    code = {path.stem: "".join(found for _, found in examples(path)) for path in PAGES}
    operators = [operator.name().removeprefix("visionattn::").partition(".")[0] for operator in decompositions()]
    forward = [name for name in operators if not name.endswith("_backward")]
    assert [name for name in blocks.__all__ if not re.search(rf"\b{name}\b", code["blocks"])] == []
    assert [name for name in forward if f"torch.ops.visionattn.{name}(" not in code["operators"]] == []
    page = (DOCS / "reference" / "commands.md").read_text() + code["export"]
    assert [name for name in (*COMMANDS, *TRAINING) if f"visionattn {name} " not in page.replace("\n", " \n")] == []
