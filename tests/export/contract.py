"""What the exported file of every model name has to be; parametrised over the names that exist."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn
from torch.optim.swa_utils import update_bn

import visionattn
from visionattn.export import OnnxFile, OnnxModel, export_onnx
from visionattn.export.api import draw_random_weights
from visionattn.models import names
from visionattn.zoo import read_costs


def smallest_names() -> list[str]:
    """The name with the fewest parameters of each family (a family is a file in `visionattn/models`)."""
    smallest: dict[str, tuple[int, str]] = {}
    for name, cost in read_costs().items():
        family = model_entrypoint(name).__module__
        smallest[family] = min(smallest.get(family, (cost.parameters, name)), (cost.parameters, name))
    return [SAME_BRANCHES.get(name, name) for _, name in smallest.values()]


def draw_weights(model: nn.Module) -> nn.Module:
    """Draw every weight so that each layer's output matters: at their start many layers multiply by 0 or nearly.

    Batch norm gets the statistics of random images, as training would have given it.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = noise / fan_in**0.5 if parameter.ndim > 1 else 1 + 0.2 * noise
    update_bn([torch.rand(4, *model.pretrained_cfg["input_size"])], model)
    return model


# The symbolic shapes of each further layer of a kind cost seconds and take no new branch.
ONE_MATCHING_LAYER = {"widths": (16, 16, 32, 32), "encoder_depths": (1, 1, 1, 1), "depths": (0, 1, 0, 1)}
ONE_LAYER_OF_A_KIND: dict[str, dict[str, Any]] = {
    "va_match_flow_nano": ONE_MATCHING_LAYER,
    "va_match_stereo_nano": ONE_MATCHING_LAYER,
    "va_halonet_nano_32": {"depths": (1, 1), "widths": (16, 32), "heads": (1, 2), "stages": ("conv", "halo")},
    "va_minimal_vit_nano_patch7_28_minimum": {"depth": 1},
    "va_vit_nano_patch7_28": {"depth": 1},
    "va_cca_minimal_vit_nano_patch4_32": {"backbone_args": {"depth": 1}},
    "va_mobilenetv2_ulsam_050_32": {"layout": "v1", "places": (11,)},
}

# Names with a backbone that is exported under its own name too.
SAME_BRANCHES = {"va_cca_halonet_nano_32": "va_cca_minimal_vit_nano_patch4_32"}

# First size of the check where a network's own is large.
SMALL = {"va_match_flow_nano": (192, 224), "va_match_stereo_nano": (192, 224)}


def export_by_name(name: str, folder: Path, **settings: object) -> OnnxFile:
    """Export a model name with drawn weights.

    Those that match two images decide: by the largest of many scores, by a distance below 2 pixels. Where weights are
    loud, some decision is always so close that rounding makes it; where a start is untrained, all its scores are.
    """
    model = timm.create_model(name, **settings)
    if model.task in ("stereo", "flow"):
        draw_random_weights(model, None)
        start = model.start
        start.q.weight.data *= 2
        start.k.weight.data = start.q.weight.data.clone()  # so that what looks alike matches
    else:
        draw_weights(model)
    return export_onnx(model, folder / "model.onnx", weights="drawn", input_size=SMALL.get(name) if settings else None)


def check_for_mobile(path: Path) -> None:
    """No tensor has more than five axes, which LiteRT, ncnn and MNN do not take."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in [*graph.value_info, *graph.output]}
    assert ranks.keys() >= {name for node in graph.node for name in node.output if name}
    assert max(ranks.values()) <= 5


class ExportContract:
    """Tests of one `export_by_name`, which a fixture `exported` gives."""

    def test_every_size_and_batch_agrees(self, exported):
        # Half of the images at least show an error of rounding alone, where rounding can turn decisions.
        assert all(row.passed and row.spread > 1e-2 for row in exported.rows)
        errors = [row.error / row.spread for row in exported.rows]
        assert (statistics.median(errors) if exported.spec.task in ("stereo", "flow") else max(errors)) <= 2e-5
        assert {row.batch for row in exported.rows} == {1, 3}
        sizes = {(row.height, row.width) for row in exported.rows}
        assert tuple(exported.spec.input_size[1:]) in sizes
        fixed = get_pretrained_cfg(exported.spec.model).fixed_input_size
        assert exported.spec.dynamic_axes == (["batch"] if fixed else ["batch", "height", "width"])
        assert len(sizes) == (1 if fixed else 3)

    def test_graph_is_plain_onnx(self, exported):
        graph = onnx.load(exported.path).graph
        assert {node.domain for node in graph.node} == {""}
        for value, key in zip(graph.input, exported.spec.input_names, strict=True):
            axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            expected = ["batch", exported.spec.input_size[0], "height", "width"]
            if not exported.spec.dynamic_size:
                expected[2:] = exported.spec.input_size[1:]
            assert value.name == key
            assert axes == expected
        assert [value.name for value in graph.output] == exported.spec.output_names

    def test_mobile_runtimes_read_the_graph(self, exported):
        check_for_mobile(exported.path)

    def test_old_runtimes_read_the_file(self, exported):
        assert onnx.load(exported.path).ir_version == 9  # the oldest of operator set 20

    def test_metadata_says_how_to_use_the_file(self, exported):
        cfg = get_pretrained_cfg(exported.spec.model)
        metadata = OnnxModel(exported.path).session.get_modelmeta().custom_metadata_map
        assert metadata["model"] in names()
        assert metadata["visionattn"] == visionattn.__version__
        assert metadata["weights"] == "drawn"
        assert json.loads(metadata["input_size"]) == [
            cfg.input_size[0],
            *SMALL.get(cfg.architecture, cfg.input_size[1:]),
        ]
        assert json.loads(metadata["mean"]) == pytest.approx(list(cfg.mean))
        assert json.loads(metadata["std"]) == pytest.approx(list(cfg.std))

    def test_file_holds_nothing_of_this_machine(self, exported):
        assert b"site-packages" not in exported.path.read_bytes()
        assert str(exported.path.parent).encode() not in exported.path.read_bytes()
        assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]
