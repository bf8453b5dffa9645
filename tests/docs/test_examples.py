"""The examples of the front page and the reference run: those of a page in their order, as a reader types them.

Commands that take minutes run on toy data with fewer steps, or are only parsed.
"""

import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_model

from visionattn import blocks
from visionattn.cli import COMMANDS, TRAINING, _parser, main
from visionattn.kernels import decompositions

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "index.md", *sorted((DOCS / "reference").glob("*.md")))
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "$ visionattn "
COMMANDS_PAGE = DOCS / "reference" / "commands.md"
LONG = re.findall(r"^visionattn (.*)$", COMMANDS_PAGE.read_text(), re.MULTILINE)
ONLY_PARSED = ("quickstart", "arena", "demo")
SHORTENED = {
    "fit": "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1",
    "validate": "--trainer.limit_val_batches 1",
    "test": "--trainer.limit_test_batches 1",
    "probe": "--heads gap --no-knn --no-pixels --epochs 1 --few-shot '' --maps 0 --lrs 0.1 --workers 0 --output report",
}


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


def toy_image(path, side, generator, light=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, light, (side, side, 3), dtype=np.uint8)).save(path)


def test_long_commands(tmp_path, monkeypatch):
    """In the order of the page: the checkpoint of `fit` is what the commands after it read."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("first.png", "second.png", "photos/one.png"):
        toy_image(Path(name), 161, generator)
    for light in (128, 255):
        for number in range(8):
            toy_image(Path(f"classes/{light}/{number}.png"), 32, generator, light)
    save_model(timm.create_model("va_match_flow_nano"), "flow.safetensors")
    for line in LONG:
        command, *_ = words = shlex.split(line)
        if command in ONLY_PARSED:
            assert _parser(command).parse_args(words).command == command
            continue
        assert main([*words, *shlex.split(SHORTENED.get(command, ""))]) == 0, line
        if command == "fit":
            next(Path("runs").rglob("best.ckpt")).rename("best.ckpt")
    assert {line.partition(" ")[0] for line in LONG} == {*ONLY_PARSED, *SHORTENED, "flow", "predict"}
    assert all(Path(name).is_file() for name in ("out.flo", "report/report.html"))
    assert "one.png," in Path("predictions.csv").read_text()


def test_every_block_operator_and_command_has_an_example():
    code = {path.stem: "".join(found for _, found in examples(path)) for path in PAGES}
    operators = [operator.name().removeprefix("visionattn::").partition(".")[0] for operator in decompositions()]
    forward = [name for name in operators if not name.endswith("_backward")]
    assert [name for name in blocks.__all__ if not re.search(rf"\b{name}\b", code["blocks"])] == []
    assert [name for name in forward if f"torch.ops.visionattn.{name}(" not in code["operators"]] == []
    page = COMMANDS_PAGE.read_text() + code["export"]
    assert [name for name in (*COMMANDS, *TRAINING) if f"visionattn {name} " not in page.replace("\n", " \n")] == []
