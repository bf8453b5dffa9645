"""The reference's examples run: those of a page one after the other, as a reader types them."""

import re
import textwrap
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES = sorted(REFERENCE.glob("*.md"))
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def examples(path):
    """The python blocks of a page, with as many empty lines before each as to give errors the page's line numbers."""
    page = path.read_text()
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start(2))
        yield "\n" * line + textwrap.dedent(found[2])


@pytest.mark.parametrize("path", [path for path in PAGES if any(examples(path))], ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for code in examples(path):
        exec(compile(code, str(path), "exec"), scope)
