"""Ways to damage bytes, texts, nested values, files and folders, drawn by a given random generator."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import yaml

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
WORDS = ["", " ", "nan", "-inf", "-1", "0", "1e999", "99999999999", "é日", "\x1b[31m", "%s", "{}", "..", "-", "--"]
WORDS += ["x" * 5000]
VALUES = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**63, 10**30, *WORDS, [], {}, [[]], {"a": {}}]


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat, or write a notable number; early bytes, which hold headers, more often."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = len(data) if rng.random() < 0.5 else min(len(data), 200)
        at, kind = rng.randrange(end + 1), rng.randrange(6)
        length = rng.choice((1, 4, 16, 100))
        if kind == 0:
            data = data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + rng.randbytes(length) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at : at + length] * rng.choice((0, 2, 50)) + data[at + length :]
        elif kind == 4:
            data = data[:at] + struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS)) + data[at + 4 :]
        else:
            data = data[:at] + bytes([rng.choice((0, 255))]) * length + data[at + length :]
    return data


def damaged_text(rng: Random, text: str, separator: str) -> str:
    """Replace, drop or repeat some of what stands between separators."""
    parts = text.split(separator)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        parts[at : at + 1] = rng.choice(([rng.choice(WORDS)], [], [parts[at]] * 2, [parts[at][::-1]]))
        parts = parts or [""]
    return separator.join(parts)


def damaged_value(rng: Random, value: Any) -> Any:
    """Replace, drop, rename or nest some entries of nested dictionaries and lists."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        owner = value
        if not isinstance(owner, (dict, list)) or not owner:
            return rng.choice(VALUES)
        while True:
            key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
            inner = owner[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
                break
            owner = inner
        kind = rng.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice([*WORDS, 7, None])] = owner.pop(key)
        elif kind == 2:
            owner[key] = [owner[key]]
        else:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def damaged_file(rng: Random, source: Path, case: Path) -> Path:
    """A copy of a file with damaged bytes; of JSON and YAML, more often with damaged values."""
    target = case / source.name
    if source.suffix in (".json", ".yaml") and rng.random() < 0.7:
        value = damaged_value(rng, yaml.safe_load(source.read_text()))
        text = json.dumps(value) if source.suffix == ".json" else yaml.safe_dump(value, allow_unicode=True)
        target.write_text(text if rng.random() < 0.8 else damaged_text(rng, text, "\n"))
    else:
        target.write_bytes(damaged_bytes(rng, source.read_bytes()))
    return target


def damaged_folder(rng: Random, source: Path, case: Path) -> Path:
    """A copy of a folder in which one file is damaged, cut or gone."""
    target = case / source.name
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = rng.choice(files)
    original = source / chosen.relative_to(target)
    chosen.unlink()
    if rng.random() < 0.95:
        damaged_file(rng, original, chosen.parent)
    return target
