"""What the package declares and ships: every direct import, every paper, one version, the files of wheel and sdist."""

import ast
import re
import sys
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

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
PAGE = "visionattn/demo/page/"  # built by `make web`, and then a part of the wheel
DIST_INFO = f"visionattn-{visionattn.__version__}.dist-info/"
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


def test_the_version_is_the_same_everywhere():
    changelog, citation = ((ROOT.parent / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff"))
    assert re.findall(r"^## (.*)$", changelog, re.MULTILINE)[0] == "Unreleased"
    version, date = re.search(r"^## ([\d.]+) - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE).groups()
    assert version == visionattn.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation


def test_type_checkers_see_every_function():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    known = {name.asname for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names}
    callable_packages = {"arena", "demo", "export", "probe", "search"}
    assert known - {None, "frozen"} == set(visionattn.__all__) - callable_packages  # None: of Any, not passed on


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    builders = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling, which builds the wheel")
    builder = builders.WheelBuilder(str(ROOT.parent))
    return Path(next(builder.build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])))


def source_files():
    found = [path for folder in (ROOT, ROOT.parent / "visionattn_runtime") for path in folder.rglob("*")]
    names = {path.relative_to(ROOT.parent).as_posix() for path in found if path.is_file()}
    return {name for name in names if "/__pycache__/" not in name and not name.startswith(PAGE)}


def test_the_wheel_has_the_package_with_its_weights_and_nothing_else(wheel):
    names = {name for name in ZipFile(wheel).namelist() if not name.startswith((PAGE, DIST_INFO))}
    only_for_the_page = {"visionattn/demo/digits.safetensors"}  # exported into the page when it is built
    assert names == (source_files() | {"visionattn_command.py"}) - only_for_the_page


def test_a_page_in_the_wheel_has_its_runtime_and_models_compressed(wheel):
    names = [name.removeprefix(PAGE) for name in ZipFile(wheel).namelist() if name.startswith(PAGE)]
    if not names:
        pytest.skip("the page is not built: `make web`")
    assert [name for name in names if name.endswith((".wasm", ".wasm.xz"))] == [
        "runtime/ort-wasm-simd-threaded.wasm.xz"
    ]
    models = [name for name in names if name.startswith("models/")]
    assert models.count("models/stereo.onnx.xz") == 1
    assert all(name.endswith((".onnx.xz", ".json")) for name in models)


def test_a_built_page_reads_the_weights_of_the_package():
    copies = list((ROOT.parent / PAGE / "models").glob("*.safetensors"))
    if not copies:
        pytest.skip("the page is not built: `make web`")
    for copy in copies:
        assert copy.read_bytes() == (ROOT / "weights" / copy.name).read_bytes(), "built before: `make web`"


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 15e6


def test_the_metadata_of_the_wheel(wheel):
    with ZipFile(wheel) as archive:
        metadata = archive.read(f"{DIST_INFO}METADATA").decode()
        points = archive.read(f"{DIST_INFO}entry_points.txt").decode()
    head, description = metadata.split("\n\n", 1)
    assert f"\nVersion: {visionattn.__version__}\n" in head
    assert "\nLicense-Expression: Apache-2.0\n" in head
    assert description.strip() == (ROOT.parent / "README.md").read_text().strip()
    assert points.split() == ["[console_scripts]", "visionattn", "=", "visionattn_command:main"]


def test_the_sdist_has_what_the_tests_need():
    builders = pytest.importorskip("hatchling.builders.sdist", reason="needs hatchling, which builds the sdist")
    files = builders.SdistBuilder(str(ROOT.parent)).recurse_included_files()
    parts = {PurePosixPath(file.distribution_path).parts[0] for file in files}
    assert {"tests", "benchmarks", "tools", "results", "docs", "web", "Makefile", "constraints.txt"} - parts == set()
    assert parts & {"dist", "site", "runs", ".venv"} == set()
