"""The toys' files, exported once."""

import numpy as np
import pytest

from tests.runtime import toys


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """By name: each toy of its default form, two of one fixed size, and one of a fixed batch."""
    folder = tmp_path_factory.mktemp("files")
    models = {name: getattr(toys, name)().eval() for name in toys.NAMES}
    paths = {name: toys.write(model, folder / f"{name}.onnx") for name, model in models.items()}
    for name in ("Enlarger", "Stereo"):
        paths[f"{name}Static"] = toys.write(models[name], folder / f"{name}Static.onnx", static=True, batch=1)
    paths["Batch2"] = toys.write(models["Labelled"], folder / "Batch2.onnx", batch=2)
    for half, suffix in (("Tower", "tower"), ("Head", "head")):
        toys.write(getattr(toys, half)().eval(), folder / f"Pair.{suffix}.onnx")
    paths["Pair"] = folder / "Pair.onnx"
    return paths


@pytest.fixture
def photo():
    """An image that varies over its whole, (36, 50, 3) of uint8."""
    rows, columns = np.mgrid[:36, :50]
    waves = [np.sin(rows / 3 + shift) * np.cos(columns / 4 - shift) for shift in range(3)]
    return np.uint8(np.stack(waves, -1) * 120 + 128)
