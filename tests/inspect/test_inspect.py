"""`visionattn.check`: the whole of it, with a model and without."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch

import visionattn
from tests.inspect import graphs
from tests.runtime import toys
from visionattn.errors import InputError, UnknownNameError
from visionattn.export.inspect import check


@pytest.fixture(scope="module")
def stereo(tmp_path_factory):
    return toys.write(toys.Stereo().eval(), tmp_path_factory.mktemp("toy") / "stereo.onnx")


def test_our_own_file(stereo):
    told = []
    found = visionattn.check(stereo, model=toys.Stereo().eval(), threads=(1,), progress=told.append)
    assert found.passed
    assert found.spec.task == "stereo"
    assert found.metadata["size_multiple"] == "8"
    assert len(found.structure.inputs) == 2
    # Sizes that the metadata exclude are tried too; that they fail is no problem.
    assert {run.stated for run in found.runs} == {True, False}
    assert all(not run.fault for run in found.runs if run.stated)
    assert (found.runs[0].height, found.runs[0].width) == (24, 32)
    assert [cost.threads for cost in found.costs] == [1]
    assert len(found.comparison) == 6
    assert max(row.error for row in found.comparison) < 1e-4
    assert told[3] == "Comparing the file with PyTorch."
    assert [line[:17] for line in told[4:]] == [f"Comparison {one} of 6" for one in (1, 3, 5)]
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["problems"] == []
    assert plain["targets"][0]["name"] == "NNAPI"
    assert dataclasses.is_dataclass(found)


def test_another_model(stereo):
    other = toys.Stereo().eval()
    torch.nn.init.ones_(other.conv.weight)
    found = check(stereo, model=other, threads=(1,))
    assert found.comparison == []
    assert "differ from those of the model" in found.problems[0]
    found = check(stereo, model=toys.Labelled().eval(), threads=(1,))
    assert len(found.problems) == 1


class Plain(torch.nn.Module):
    """The convolution of `graphs`, as a model of somebody else."""

    task, num_classes, output_names = "features", 0, ("maps",)
    pretrained_cfg = {"input_size": (3, 32, 32)}

    def __init__(self, path):
        super().__init__()
        weight = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
        self.weight = torch.nn.Parameter(torch.from_numpy(weight.copy()))

    def forward(self, image):
        return torch.nn.functional.conv2d(image, self.weight, padding=1)


def test_a_foreign_file_against_its_model(tmp_path):
    path = graphs.convolution(tmp_path / "a.onnx")
    before = path.read_bytes()
    found = check(path, model=Plain(path), image_size=32, threads=(1,))
    assert found.passed
    assert {(row.height, row.width) for row in found.comparison} >= {(32, 32)}
    assert len(found.comparison) == 6
    assert (found.spec, found.metadata) == (None, {})
    assert path.read_bytes() == before


def test_what_is_wrong_is_said(tmp_path, stereo):
    nan = graphs.convolution(tmp_path / "nan.onnx", np.full((2, 3, 3, 3), np.nan, np.float32), shape=[1, 3, 8, 8])
    assert check(nan, threads=(1,)).problems == ["At 8 x 8, batch 1: an output contains NaN or infinite values."]
    (problem,) = check(graphs.without_image(tmp_path / "vector.onnx")).problems
    assert problem.startswith("The file has no image input")
    damaged = onnx.load(stereo)
    for entry in damaged.metadata_props:
        if entry.key == "input_size":
            entry.value = "[3"
    onnx.save(damaged, tmp_path / "damaged.onnx")
    problems = check(tmp_path / "damaged.onnx", threads=(1,)).problems
    assert problems[0] == "The metadata are invalid: the entry input_size is not JSON: [3."


def test_mistakes(tmp_path, stereo):
    with pytest.raises(InputError, match="image size must be at least 1"):
        check(stereo, image_size=0)
    with pytest.raises(InputError, match="number of threads must be at least 1; got 0"):
        check(stereo, threads=(0,))
    with pytest.raises(UnknownNameError, match="va_lost"):
        check(stereo, model="va_lost")
