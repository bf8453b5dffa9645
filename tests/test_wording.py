"""Prose uses the standard terms: words and turns of phrase that must not come back, with the better ones.

Checked are docstrings, comments and texts of three words or more in Python files, and Markdown outside of code.
Identifiers, code in backticks and single words are not. A pattern is added only if it never matches correct English.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ("visionattn", "visionattn_runtime", "benchmarks", "tools")

_COUNTED = "images|tokens|bytes|milliseconds|seconds|registers|queries|steps|passes|parameters|macs"
_UNITS = "class|image|token|step|second|pixel|epoch|seed|layer|head|thread|call|pass|batch|backbone|query|condition"
_THINGS = (
    "file|folder|image|picture|video|report|store|mask|plan|backbone|checkpoint|task|mixer|tensor|table|head|format"
)
_FOLLOWED = "of|in|for|to|that|with|below|is|are|has|can|was"
_DESCRIBED = "mean|seed|name|device|settings|epochs|interval|path"

BETTER = {
    r"(?<!ground )(?<!ground-)\btruths?\b(?!:)": "ground truth",
    r"\bway back\b": "backward pass",
    rf"\b(?:{_COUNTED}) an? (?:{_UNITS})\b(?! (?:{_FOLLOWED})\b)": "per, as in 'images per class'",
    r"\b(?:a|one) (?:row|vector|panel|column) an? (?!time\b)\w+": "one row per ...",
    r"\b(?:can|could|cannot|may|to|they are|it is) (?:not )?be had\b": "loaded, available",
    r"\breckon(?:ed|s|ing)?\b": "estimated, computed",
    r"\bforetold\b": "predicted",
    r"\bwhich \S+ (?:\w+ )?do(?:es)? not divide\b": "dim (8) must be divisible by num_heads (3)",
    rf"(?<!there )(?<!here )\b(?:is|are) no (?:{_THINGS})s?\b(?! (?:{_FOLLOWED})\b)": "is not a ...",
    r"\bof no use\b": "not supported, cannot be used",
    r"\bseen in both\b": "non-occluded",
    r"\bit can be one of\b": "must be one of 'a', 'b'; got 'c'",
    r"\bwhole or not at all\b": "completely or not at all",
    r"\bas if nothing had happened\b": "exact resume",
    r"\bthe like of\b": "similar to",
    r"\b(?:goes|go|gone|went) on (?:where|from there|behind)\b": "resume",
    r"\bunasked\b": "without being asked, by default",
    r"\bwhat is what\b": "see",
    r"\banew\b": "again",
    r": likewise[.,;]": "describe the argument",
    rf"\b(?:{_DESCRIBED}): of (?:the|its|a|each|all|what)\b": "name it, as in 'seed: Seed of the draws.'",
}
PATTERNS = [(re.compile(pattern), better) for pattern, better in BETTER.items()]


def python_prose(source: str) -> list[tuple[int, str]]:
    """Line and text of each docstring, longer string and block of comments."""
    found: list[tuple[int, str]] = []
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(value) for value in ast.walk(node) if isinstance(value, ast.Constant)}
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if len(text.split()) >= 3:
            found.append((node.lineno, text))
    comments: dict[int, list[str]] = {}  # by the line of a block's first comment
    start = end = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            start, end = start if line == end + 1 else line, line
            comments.setdefault(start, []).append(token.string.lstrip("#"))
    found += [(line, "\n".join(block)) for line, block in comments.items()]
    return found


def markdown_prose(source: str) -> list[tuple[int, str]]:
    """The text outside of code blocks, which are blanked so that lines keep their numbers."""
    without = re.sub(r"^( *)(```|~~~).*?^ *\2", lambda code: "\n" * code[0].count("\n"), source, flags=re.M | re.S)
    return [(1, without)]


def offences(line: int, text: str) -> list[str]:
    """What is found in a text that begins at a line."""
    text = re.sub(r"`[^`]*`", lambda code: "`" + "\n" * code[0].count("\n") + "`", text)
    lines, flat = [], ""
    for number, part in enumerate(text.split("\n")):
        lines.append((len(flat), line + number))
        flat += part.strip().lower() + " "
    found = []
    for pattern, better in PATTERNS:
        for match in pattern.finditer(flat):
            at = max(number for start, number in lines if start <= match.start())
            found.append(f"{at}: '{match[0]}'; better: {better}")
    return found


def is_suspect(source: str) -> bool:
    """Whether a pattern matches anywhere, identifiers included: most files need not be parsed."""
    flat = re.sub(r"""[ "']*\n[ #]*[rf]*["']*""", " ", source.lower())
    return any(pattern.search(flat) for pattern, _ in PATTERNS)


def files() -> list[Path]:
    """Everything that is checked."""
    python = [file for room in PYTHON for file in (ROOT / room).rglob("*.py")]
    return sorted([*python, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])


def test_prose():
    found = []
    for file in files():
        source = file.read_text()
        if not is_suspect(source):
            continue
        prose = python_prose if file.suffix == ".py" else markdown_prose
        for line, text in prose(source):
            found += [f"{file.relative_to(ROOT)}:{offence}" for offence in offences(line, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "sentence",
    [
        "errors against the truth", "what the way back needs", "5 images a class", "a table with a row a head",
        "the weights could not be had", "memory is reckoned with", "dim is 8, which 3 heads do not divide",
        "this is no file", "the run goes on where it stopped", "it can be one of a, b", "std: Likewise.",
        "seed: Of the draws.",
    ],
)  # fmt: skip
def test_dialect_is_found(sentence):
    assert len(offences(1, sentence)) == 1


def test_correct_english_is_not():
    for sentence in (
        "the ground truth, and ground-truth masks", "truth: The ground truth.", "find the way, then back", "`truth`",
        "With few images an epoch is short.", "There is no file of this name.", "It is no longer supported.",
        "the loss that it had to reach", "a row at a time", "per class", "6 heads divide the width",
    ):  # fmt: skip
        assert not offences(1, sentence)


def test_prose_of_python():
    source = '"""The whole\ntruth."""\ntruth = f"{truth} is the truth here"  # a way\n# back\n'
    assert [line for line, text in python_prose(source) if offences(line, text)] == [1, 3, 3]
    assert offences(4, "of the\nway back") == ["5: 'way back'; better: backward pass"]
    for suspect in (source, "# the way\n    # back", 'f"the way "\n    f"back"'):
        assert is_suspect(suspect)
    assert markdown_prose("a\n```\nthe truth\n```\nb\n") == [(1, "a\n\n\n\nb\n")]
