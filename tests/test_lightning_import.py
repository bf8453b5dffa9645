"""Lightning is imported without SciPy, which stays whole."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from tests.forking import run
from visionattn import lightning_import
from visionattn.errors import MissingPackageError

needs_lightning = pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed")


@needs_lightning
@pytest.mark.parametrize("statement", ["from visionattn.train import cli", "from visionattn.data import module"])
def test_scipy_is_imported_when_it_is_used(statement):
    code = (
        f"{statement}; import sys; print('torchmetrics' in sys.modules, 'scipy.signal' in sys.modules); "
        "import scipy.signal; print(scipy.signal.__file__.endswith('signal/__init__.py')); "
        "print(float(scipy.signal.windows.hamming(3)[1]))"
    )
    assert run(code).stdout.split() == ["True", "False", "True", "1.0"]


@needs_lightning
def test_an_imported_scipy_is_the_same():
    code = (
        "import sys; import scipy.signal; before = sys.modules['scipy.signal']; from visionattn.train import cli; "
        "print(sys.modules['scipy.signal'] is before)"
    )
    assert run(code).stdout == "True\n"


def test_another_use_during_the_import_gets_the_real_module(monkeypatch):
    """A later torchmetrics that uses more of scipy.signal still finds it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scipy", "torchmetrics")]:
        monkeypatch.delitem(sys.modules, name)
    real = ModuleType("scipy.signal")
    real.windows = "windows"
    seen = []

    def require(module: str, extra: str) -> ModuleType:
        stand_in = sys.modules["scipy.signal"]
        seen.extend([stand_in.hamming, stand_in.windows, "scipy.signal" in sys.modules])
        return ModuleType(module)

    monkeypatch.setattr(lightning_import, "require", require)
    monkeypatch.setattr(lightning_import.importlib, "import_module", lambda name: real)
    assert lightning_import.import_lightning("lightning.pytorch").__name__ == "lightning.pytorch"
    assert seen == [None, "windows", False]
    assert "scipy.signal" not in sys.modules


def test_without_lightning(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scipy", "torchmetrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(MissingPackageError, match=r"visionattn\[train\]"):
        lightning_import.import_lightning()
    assert "scipy.signal" not in sys.modules
