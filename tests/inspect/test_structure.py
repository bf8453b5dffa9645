"""What a file is made of, and files that are none."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.inspect import graphs
from visionattn.errors import InputError
from visionattn.export.inspect.structure import Value, read_structure


def test_a_foreign_file(tmp_path):
    structure, metadata = read_structure(graphs.convolution(tmp_path / "a.onnx"))
    assert (structure.ir_version, structure.opsets, structure.producer) == (8, {"": 17}, "other")
    assert structure.inputs == [Value("image", "float", ["n", 3, "h", "w"])]
    assert (structure.nodes, structure.operators, structure.custom_domains) == (1, {"Conv": 1}, [])
    assert (structure.weights, structure.external_data, structure.highest_rank) == (2 * 27 * 4, [], 4)
    assert structure.fault == ""
    assert metadata == {}


@pytest.mark.parametrize(
    ("shape", "kind", "layout"),
    [
        (["n", 3, 8, 8], "float", "NCHW"),
        (["n", "h", "w", 3], "uint8", "NHWC"),
        ([1, 1, 8, 8], "float16", "NCHW"),
        (["n", 64, 8, 8], "float", None),
        (["n", 3, 8], "float", None),
        (["n", 3, 8, 8], "int64", None),
        (None, "float", None),
    ],
)
def test_which_inputs_are_images(shape, kind, layout):
    assert Value("x", kind, shape).layout == layout


def test_operators_of_others_and_inner_graphs(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Neg", ["image"], ["a"])], "inner", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    nodes = [
        helper.make_node("If", ["yes"], ["kept"], then_branch=inner, else_branch=inner),
        helper.make_node("Twist", ["kept"], ["result"], domain="my.own"),
    ]
    path = graphs.write(tmp_path / "a.onnx", nodes, {"yes": np.array(True)}, domain="my.own")
    structure, _ = read_structure(path)
    assert structure.operators == {"Neg": 2, "If": 1, "my.own.Twist": 1}
    assert structure.custom_domains == ["my.own"]
    assert structure.nodes == 4


def test_what_the_checker_finds(tmp_path):
    path = graphs.write(tmp_path / "a.onnx", [helper.make_node("Conv", ["absent", "image"], ["result"])])
    structure, _ = read_structure(path)
    assert "absent" in structure.fault
    assert "\n" not in structure.fault


def test_external_data(tmp_path):
    path = graphs.convolution(tmp_path / "a.onnx", np.ones((64, 3, 3, 3), np.float32))
    model = onnx.load(path)
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data")
    assert read_structure(tmp_path / "b.onnx")[0].external_data == ["b.data"]
    (tmp_path / "b.data").unlink()
    with pytest.raises(InputError, match=r"b\.onnx stores its weights in b\.data, which is missing"):
        read_structure(tmp_path / "b.onnx")


def test_what_is_no_file(tmp_path):
    whole = graphs.convolution(tmp_path / "a.onnx").read_bytes()
    for name, content in {"text": b"no model", "empty": b"", "cut": whole[:200], "zeros": bytes(500)}.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.onnx is not an ONNX file, or is truncated: ") as raised:
            read_structure(tmp_path / f"{name}.onnx")
        assert "\n" not in str(raised.value)
    with open(tmp_path / "huge.onnx", "wb") as huge:
        huge.truncate(2**32)
    for name, told in {"huge.onnx": "has 4.3 GB", "absent.onnx": "There is no file", ".": "There is no file"}.items():
        with pytest.raises(InputError, match=told):
            read_structure(tmp_path / name)


def test_values_that_are_no_tensors(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None)
    path = graphs.convolution(tmp_path / "a.onnx", inputs=[sequence])
    assert read_structure(path)[0].inputs[1] == Value("many", "sequence_type", None)
