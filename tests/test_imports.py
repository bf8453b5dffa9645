"""Imports go down only, and `import visionattn` is light."""

import ast
import graphlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import visionattn
from tests.forking import run

ROOT = Path(visionattn.__file__).parent
# A layer may import those to its right and its own; the modules in EVERYBODY belong to all.
LAYERS = [
    {"cli"},
    {"quickstart", "zoo", "demo"},
    {"train", "arena"},
    {"frozen"},
    {"probe", "evaluate", "search"},
    {"predict"},
    {"export"},
    {"metrics"},
    {"opening"},
    {"adapters"},
    {"checkpoints", "data", "surgery"},
    {"models", "card", "hub"},
    {"swapping"},
    {"mixers"},
    {"weights", "blocks", "cost"},
    {"kernels"},
]
EVERYBODY = {
    "allocator",
    "arguments",
    "devices",
    "errors",
    "files",
    "lazy",
    "lightning_import",
    "moved",
    "page",
    "progress",
}
FROM_ROOT = {"__version__", "accelerate", "insert", "load", "swap"}  # names of the package itself
HEAVY = [
    "lightning",
    "torchmetrics",
    "sklearn",
    "skimage",
    "cv2",
    "albumentations",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "triton",
    "faiss",
    "pytorch_metric_learning",
]


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imported(path: Path) -> set[str]:
    """Sub-packages of visionattn that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "visionattn":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("visionattn.")}
    return found - EVERYBODY


def owner(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    name = owner(path)
    if name == "__init__":
        return
    if name in EVERYBODY:
        assert imported(path) == set()
        return
    others = imported(path) - FROM_ROOT - {name}
    assert {other for other in others if layer(other) <= layer(name)} == set()


def modules_that_import_each_other() -> list[str]:
    """Cycles between modules, imports inside of functions included."""
    graph: dict[str, set[str]] = {}
    names = {dotted(path): path for path in ROOT.rglob("*.py")}
    for name, path in names.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = {f"{node.module}.{alias.name}" for alias in node.names} & set(names)
                graph[name] |= found or ({node.module} & set(names))
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & set(names)
        graph[name] -= {name, ROOT.name}
    order = graphlib.TopologicalSorter(graph)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_each_other():
    assert modules_that_import_each_other() == []


def test_kernels_do_not_know_timm():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "import timm" not in path.read_text()
        assert "from timm" not in path.read_text()


@pytest.fixture(scope="module")
def forks():
    """Measurements in three processes that have imported timm.

    Each: CPU seconds of importing the package, modules that it adds, all modules after `visionattn.export.cli` too.
    """
    code = """
import json, sys, time, timm
before, start = set(sys.modules), time.process_time()
import visionattn
seconds, package = time.process_time() - start, set(sys.modules) - before
import visionattn.export.cli
print(json.dumps([seconds, list(package), list(sys.modules)]))
"""
    return [json.loads(run(code).stdout) for _ in range(3)]


def test_the_package_works_without_the_heavy_ones():
    code = f"""
import sys
from importlib.machinery import PathFinder
class WithoutHeavy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        absent = name.split(".")[0] in {HEAVY!r}
        return None if absent else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutHeavy
import timm, torch, visionattn
from visionattn import cli
model = timm.create_model("va_minimal_vit_nano_patch7_28").eval()
model(torch.zeros(1, 1, 28, 28))
torch.ops.visionattn.symmetric_gate(torch.ones(3), torch.ones(3))
assert cli.main(["list", "nano"]) == 0
assert cli.main(["export", "va_minimal_vit_nano_patch7_28", "--output", "never.onnx"]) == 2
assert cli.main(["fit"]) == 2
assert cli.main(["quickstart"]) == 2
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("Install it with: pip install 'visionattn[") == 3


def test_the_package_adds_little_to_timm(forks):
    for _, modules, _ in forks:
        assert {name.split(".")[0] for name in modules} & set(HEAVY) == set()
    assert statistics.median(seconds for seconds, *_ in forks) < 0.5


def test_the_command_of_export_needs_no_optional_package(forks):
    for *_, modules in forks:
        assert "visionattn.export.cli" in modules
        assert {"onnx", "onnxscript", "onnxruntime", "lightning", "visionattn.train"} & set(modules) == set()
