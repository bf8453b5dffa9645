"""Hooks of `mkdocs build`: equations become MathML, and the pages can link the CSV files of results/.

MathML needs no script, font or request: current Chromium, Firefox and Safari draw it, and screen readers read it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "results"
# What pymdownx.arithmatex leaves: \(...\) within a line, \[...\] as a block of its own.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def to_mathml(found: re.Match[str]) -> str:
    tag, latex = found.groups()
    inline = tag == "span"
    math = convert(html.unescape(latex).strip(), display="inline" if inline else "block")
    return math if inline else f'<div class="equation">{math}</div>'


def on_page_content(html: str, **_: Any) -> str:
    return EQUATION.sub(to_mathml, html)


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(RESULTS.glob("*.csv")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
