"""Shipped weights measured next to their rivals: what is left out, what is computed, and the table."""

import numpy as np
from PIL import Image

from benchmarks.shipped import __main__ as shipped
from benchmarks.shipped import measures, tables
from benchmarks.shipped.measures import EPE, PSNR, Measured, ridge_accuracy
from tools.generated_objects import write
from visionattn.evaluate import evaluate_retrieval, evaluate_sr


def test_weights_without_data_are_left_out_and_said_so(capsys):
    upscalers = [f"va_span_ch26_{kind}" for kind in ("x2", "x2.real", "x3", "x4", "x4.real")]
    others = {
        "va_cca_halonet_nano_32": "retrieve",
        "va_halonet_nano_32": "classify",
        "va_match_flow_nano": "flow",
        "va_match_stereo_nano": "stereo",
        "va_minimal_vit_micro_patch4_32": "classify",
        "va_minimal_vit_micro_patch4_32_ep": "classify",
        "va_minimal_vit_micro_patch4_32_ep.tuned_cifar10": "classify",
        "va_mobilenetv2_ulsam_050_32": "classify",
    }
    asked = []

    def upscaling(name):
        asked.append(name)
        return [Measured(name, "Set5", "bicubic", PSNR, 30.0)]

    found = shipped.run({"restore": upscaling, "stereo": None})
    assert [row.weights for row in found] == asked == upscalers
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(others)] == [
        f"{name}: not measured, no data is given for the task {task!r}." for name, task in others.items()
    ]
    assert printed[len(others)] == f"{upscalers[0]} | Set5 | bicubic | PSNR dB (Y) | 30.0"


def test_upscaling_is_that_of_evaluate(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    folder = tmp_path / "Set/HR"
    folder.mkdir(parents=True)
    Image.fromarray(image).save(folder / "a.png")
    monkeypatch.setattr(measures, "QUALITIES", (None, 75))
    rows = measures.upscaling("va_span_ch26_x4", tmp_path, None)
    expected = [mean for quality in (None, 75) for mean in evaluate_sr([], folder, scale=4, jpeg=quality).means()]
    assert [(row.data, row.method) for row in rows] == [
        (data, method) for data in ("Set", "Set, JPEG 75") for method in ("bicubic", "va_span_ch26_x4")
    ]
    assert [row.value for row in rows[::2]] == [mean.psnr_y for mean in expected]
    assert rows[1].value != rows[3].value


def test_search_is_that_of_evaluate(tmp_path):
    write(tmp_path / "objects", 200, 32)
    table = tmp_path / "objects/objects.csv"
    rows = measures.retrieval("va_cca_halonet_nano_32", table)
    own = evaluate_retrieval("va_cca_halonet_nano_32", table).own("va_cca_halonet_nano_32")
    assert [(row.data, row.value) for row in rows[:5]] == [
        (f"generated objects, {score.attribute}", 100 * score.map) for score in own
    ]
    assert [row.method for row in rows[::5]] == [rows[0].weights, "chance", f"pooled {measures.OTHER_SPACE}"]


def test_ridge_regression_separates_what_is_separable_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    apart = rng.normal(size=(300, 4)) + 20 * np.eye(4)[labels]
    noise = rng.normal(size=(300, 4))
    for features, low, high in ((apart, 100, 100), (noise, 20, 47)):
        parts = [(features[start::3], labels[start::3]) for start in range(3)]
        assert low <= ridge_accuracy(*parts) <= high


def test_table_has_the_best_in_bold_and_names_what_is_not_measured(monkeypatch):
    name, origin = "va_match_stereo_nano", {"device": "a processor", "torch": "2.0"}
    rows = [
        {"weights": name, "data": "teddy", "method": method, "metric": EPE, "value": value} | origin
        for method, value in (("sgbm_filled", "1.8"), (name, "1.3"), (f"{name} --enlarge 2", "0.8"))
    ]
    monkeypatch.setattr(tables, "read_rows", lambda path: rows)
    lines = tables.shipped_weights().splitlines()
    assert lines[2] == "| `va_match_stereo_nano` | teddy | EPE px | 1.30, **0.80** (`--enlarge 2`) | sgbm_filled 1.80 |"
    assert lines[4] == "a processor, torch 2.0."
    assert lines[6].startswith("Not measured yet: `va_cca_halonet_nano_32`, ")
