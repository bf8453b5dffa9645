"""What the package declares: every direct import, every paper."""

import ast
import re
import sys
from pathlib import Path

import pytest

import visionattn

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(visionattn.__file__).parent
PROJECT = ROOT.parent / "pyproject.toml"
# Names of modules that differ from those of the packages that bring them.
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "faiss": "faiss-cpu",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
COMES_WITH_TORCH = {"triton"}  # where torch has GPUs


def names(requirements):
    return {re.split(r"[\[<>=;,\s]", requirement)[0].lower() for requirement in requirements}


def imported():
    """Modules that the package imports, also by `require`."""
    found = set()
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "visionattn_runtime").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in found}


def test_every_direct_import_is_declared():
    project = tomllib.loads(PROJECT.read_text())["project"]
    declared = names(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        declared |= names(requirements)
    needed = (
        imported()
        - set(sys.stdlib_module_names)
        - {"visionattn", "visionattn_command", "visionattn_runtime", "__future__"}
    )
    needed -= COMES_WITH_TORCH
    assert {name for name in needed if PACKAGES.get(name, name.replace("_", "-")).lower() not in declared} == set()


def test_every_constraint_is_an_exact_version():
    lines = (ROOT.parent / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.match(r"#|[\w.-]+==[\w.]+( ;|$)", line)] == []


def test_the_papers_of_all_mechanisms_are_cited():
    readme, citation = ((ROOT.parent / name).read_text() for name in ("README.md", "CITATION.cff"))
    assert set(re.findall(r"\d{4}\.\d{5}", readme)) - set(re.findall(r"\d{4}\.\d{5}", citation)) == set()
