"""What `visionattn.probe` brings in, and what it says without the packages that it may need."""

from pathlib import Path

import visionattn.probe
from tests.forking import run

TESTS = str(Path(__file__).parents[2])
ABSENT = ["lightning", "torchmetrics", "sklearn", "scipy", "onnx", "onnxruntime", "onnxscript"]


def test_everything_named_is_there():
    assert all(callable(getattr(visionattn.probe, name)) for name in visionattn.probe.__all__ if name != "POOLINGS")


def test_the_package_brings_in_no_probing_and_what_needs_the_extra_says_so():
    code = f"""
import sys
import visionattn
print("visionattn.probe" in sys.modules)
sys.modules.update(dict.fromkeys({ABSENT!r}))  # as if they were not installed
sys.path.insert(0, {TESTS!r})
from tests.probe.arrays import clustered
from visionattn.errors import MissingPackageError
from visionattn.probe import grid, nearest_neighbours, sweep
train, test = clustered(60), clustered(30, seed=1)
result = sweep(train, test, grid(["gap"]), epochs=1, batch_size=32, warmup_epochs=0)
for rows in (result.rows, nearest_neighbours(train, test).rows):
    try:
        rows()
    except MissingPackageError as error:
        print(str(error).count("pip install 'visionattn[train]'"))
"""
    assert run(code).stdout.split() == ["False", "1", "1"]
