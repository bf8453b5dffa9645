"""Sizes and batches that run, against what a file says; what it costs."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.inspect import graphs
from visionattn.errors import InputError
from visionattn.export.inspect.running import Cost, Run, find_runs, measure_cost, own_size
from visionattn.export.inspect.structure import read_structure


def runs_of(path, size=None):
    structure, _ = read_structure(path)
    size = own_size(path, structure, None, size)
    return find_runs(path, structure, None, size)


def test_a_dynamic_file_runs_at_all_sizes(tmp_path):
    found = runs_of(graphs.convolution(tmp_path / "a.onnx"))
    assert [(run.batch, run.fault, run.stated) for run in found] == [(1, "", True), (3, "", True)] * 4
    assert {(run.height, run.width) for run in found[:2]} == {(224, 224)}
    assert found[1].outputs == [[3, 2, 224, 224]]
    assert str(found[1]) == "224 x 224, batch 3: output 3 x 2 x 224 x 224"
    # One is a multiple of 32, two are primes.
    assert [(run.height % 32, run.width % 32) for run in found[2:4]] == [(0, 0)] * 2
    assert all(run.height % 2 and run.width % 2 for run in found[4:])


def test_a_multiple_that_the_file_does_not_state(tmp_path):
    found = runs_of(graphs.in_steps_of_8(tmp_path / "a.onnx"))
    assert [not run.fault for run in found] == [True] * 4 + [False] * 4
    assert "SpaceToDepth" in found[-1].fault


def test_a_batch_that_mixes_its_images(tmp_path):
    found = runs_of(graphs.mixes_its_batch(tmp_path / "a.onnx"), (32, 32))
    assert [run.fault[:45] for run in found[:2]] == ["", "the output for the first of 3 images differs "]


def test_fixed_axes_stay(tmp_path):
    found = runs_of(graphs.convolution(tmp_path / "a.onnx", shape=[2, 3, 16, "w"]))
    assert {(run.height, run.batch) for run in found} == {(16, 2)}
    assert len({run.width for run in found}) == 4
    found = runs_of(graphs.convolution(tmp_path / "b.onnx", shape=[1, 3, 16, 24]))
    assert [(run.height, run.width, run.batch, run.fault) for run in found] == [(16, 24, 1, "")]
    with pytest.raises(InputError, match="must be 16 x 24: leave out --image-size"):
        runs_of(tmp_path / "b.onnx", (32, 32))


def test_results_that_are_not_finite(tmp_path):
    found = runs_of(graphs.convolution(tmp_path / "a.onnx", np.full((2, 3, 3, 3), np.nan, np.float32)), (16, 16))
    assert {run.fault for run in found} == {"an output contains NaN or infinite values"}


def test_bytes_in_the_order_of_pictures(tmp_path):
    node = helper.make_node("Cast", ["image"], ["result"], to=TensorProto.FLOAT)
    path = graphs.write(
        tmp_path / "a.onnx", [node], shape=["n", "h", "w", 3], type=TensorProto.UINT8, gives=TensorProto.FLOAT
    )
    found = runs_of(path, (16, 24))
    assert found[1] == Run(16, 24, 3, True, [[3, 16, 24, 3]])


def test_files_that_cannot_be_run(tmp_path):
    with pytest.raises(InputError, match=r"no image input .* was not run; its inputs are image: float, n x 5"):
        runs_of(graphs.without_image(tmp_path / "a.onnx"))
    twist = helper.make_node("Twist", ["image"], ["result"], domain="my.own")
    path = graphs.write(tmp_path / "b.onnx", [twist], domain="my.own")
    with pytest.raises(InputError, match=r"does not run at any of 224, 256, 64, 32 pixels.*Reason: .*my\.own"):
        runs_of(path)
    assert "my.own" in runs_of(path, (32, 32))[0].fault


def test_cost(tmp_path):
    path = graphs.convolution(tmp_path / "a.onnx")
    structure, _ = read_structure(path)
    (cost,) = measure_cost(path, structure, None, (64, 64), (2,))
    assert cost.threads == 2
    assert 0 < cost.milliseconds < 1000
    assert cost.runs > 1
    assert 2**20 < cost.peak_bytes < 2**30
    assert str(Cost(1, 1.5, 0.25, 9, 2**21)) == "1 thread: 1.50 ms (spread 0.25, 9 runs), 2 MiB"
