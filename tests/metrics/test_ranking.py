"""Ranking: its definition in loops, other libraries, re-identification's rule, entanglement, triplets, the command."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from tests.retrieval_toys import ToyConditional, write_table, write_triplets
from visionattn import cli
from visionattn.data.retrieval.catalogue import MISSING, Part
from visionattn.data.retrieval.catalogue_files import Triplets, read_catalogue, read_triplets
from visionattn.errors import CheckpointError, ConfigError, DataError, InputError
from visionattn.evaluate.retrieval import draw_matrix, embed_images, evaluate_retrieval, evaluate_triplets
from visionattn.metrics import ranking
from visionattn.metrics.ranking import AttributeScore, means, rank, score, score_part, score_triplets, triplet_accuracy

PRODUCTS = Path(__file__).parents[3] / "shared/data/retrieval/fashion_products"


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def by_loops(queries, gallery, query_labels, gallery_labels, query_sources=None, gallery_sources=None):
    precisions, firsts = [], []
    for q in range(len(queries)):
        order = sorted(range(len(gallery)), key=lambda g, q=q: -float(queries[q] @ gallery[g]))
        hits, total, place = 0, 0.0, 0
        first = None
        for g in order:
            same = query_labels[q] == gallery_labels[g]
            if gallery_labels[g] == MISSING:
                continue
            if query_sources is not None and same and query_sources[q] == gallery_sources[g]:
                continue
            place += 1
            if same:
                hits += 1
                total += hits / place
                first = first or place
        if hits and query_labels[q] != MISSING:
            precisions.append(total / hits)
            firsts.append(first)
    return precisions, firsts


@pytest.mark.parametrize("sources", [False, True])
def test_it_is_its_definition(sources, monkeypatch):
    monkeypatch.setattr(ranking, "CELLS", 200)  # so that there are several chunks
    queries, gallery = unit(23, 5), unit(61, 5)
    labels = torch.randint(-1, 7, (23,)), torch.randint(-1, 6, (61,))
    given = (torch.randint(0, 3, (23,)), torch.randint(0, 3, (61,))) if sources else ()
    found = rank(queries, gallery, *labels, *given)
    precisions, firsts = by_loops(queries, gallery, *labels, *given)
    assert found.average_precision.tolist() == pytest.approx(precisions, abs=1e-12)
    assert found.first.tolist() == firsts
    assert found.recall(5) == pytest.approx(np.mean([first <= 5 for first in firsts]))


def test_it_is_that_of_pytorch_metric_learning():
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    knn = pytest.importorskip("pytorch_metric_learning.utils.inference").CustomKNN(
        pytest.importorskip("pytorch_metric_learning.distances").CosineSimilarity()
    )
    queries, gallery = unit(200, 16), unit(900, 16)
    labels = torch.randint(0, 12, (200,)), torch.randint(0, 11, (900,))
    calculator = calculators.AccuracyCalculator(("mean_average_precision",), k=None, knn_func=knn)
    expected = calculator.get_accuracy(queries, labels[0], gallery, labels[1])["mean_average_precision"]
    assert rank(queries, gallery, *labels).average_precision.mean().item() == pytest.approx(expected, abs=1e-6)
    # Each against all others: an item is its own source.
    own = torch.arange(900)
    expected = calculator.get_accuracy(gallery, labels[1])["mean_average_precision"]
    found = rank(gallery, gallery, labels[1], labels[1], own, own).average_precision.mean().item()
    assert found == pytest.approx(expected, abs=1e-6)


def test_it_is_that_of_torchmetrics_with_positive_scores():
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    queries, gallery = unit(30, 8), unit(120, 8)
    labels = torch.randint(0, 5, (30,)), torch.randint(0, 5, (120,))
    scores, relevant = queries @ gallery.T, labels[0][:, None] == labels[1]
    indexes = torch.arange(30)[:, None].expand_as(scores)
    # Without the shift, relevant items of negative cosine would not count.
    metric = retrieval.RetrievalMAP(empty_target_action="skip")
    expected = metric(10 + scores.flatten(), relevant.flatten(), indexes.flatten()).item()
    assert rank(queries, gallery, *labels).average_precision.mean().item() == pytest.approx(expected, abs=1e-6)


def test_views_of_the_same_camera_are_left_out():
    # The nearest item is of the same identity and camera, the second of another identity, the third is the match.
    gallery = nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, 0.9]]), dim=1)
    query = torch.tensor([[1.0, 0.0]])
    identities, cameras = torch.tensor([7, 8, 7]), torch.tensor([1, 1, 2])
    found = rank(query, gallery, torch.tensor([7]), identities, torch.tensor([1]), cameras)
    assert (found.first.tolist(), found.average_precision.tolist()) == ([2], [0.5])
    alone = rank(query, gallery[:2], torch.tensor([7]), identities[:2], torch.tensor([1]), cameras[:2])
    assert len(alone.first) == 0


def test_equal_cosines_stand_in_the_gallerys_order():
    found = rank(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([1]), torch.tensor([0, 0, 1, 1]))
    assert found.first.tolist() == [3]
    assert found.average_precision.tolist() == [pytest.approx((1 / 3 + 2 / 4) / 2)]


def test_what_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        rank(torch.full((1, 2), torch.nan), torch.ones(4, 2), torch.tensor([1]), torch.tensor([0, 0, 1, 1]))


def part(labels, queries):
    is_query = torch.arange(len(labels)) < queries
    return Part([str(n) for n in range(len(labels))], labels, is_query, ~is_query, None)


def test_means_over_attributes():
    rows = [AttributeScore("a", 30, 50, 0.5, 0.1, 0.2, 0.3), AttributeScore("b", 10, 80, 0.9, 0.5, 0.6, 0.7)]
    plain, weighted = means(rows)
    assert plain == ("mean", 40, 80, pytest.approx(0.7), pytest.approx(0.3), pytest.approx(0.4), pytest.approx(0.5))
    assert weighted.map == pytest.approx((30 * 0.5 + 10 * 0.9) / 40)


def test_each_attribute_has_its_queries_and_gallery():
    labels = torch.tensor([[0, 0], [1, MISSING], [0, 1], [1, 0], [0, 1], [MISSING, 0]])
    spaces = unit(6, 2, 4)
    rows = score_part(spaces, part(labels, 2), ("colour", "kind"))
    assert [(row.queries, row.gallery) for row in rows] == [(2, 3), (1, 4)]
    for column, row in enumerate(rows):
        expected = by_loops(spaces[:2, column], spaces[2:, column], labels[:2, column], labels[2:, column])[0]
        assert row.map == pytest.approx(np.mean(expected))
    with pytest.raises(DataError, match="No query has a match for the attribute kind"):
        score(spaces[:, 0], part(torch.tensor([[0, 0]] * 3 + [[0, 1]] * 3), 3), 1, "kind")


def test_triplets_and_their_models(tmp_path):
    anchors, near, far = unit(50, 6), unit(50, 6), unit(50, 6)
    right = [bool(a @ n > a @ f) for a, n, f in zip(anchors, near, far)]
    assert triplet_accuracy(anchors, far, near).tolist() == right

    table = write_table(tmp_path)
    store = read_catalogue("table", table).images
    rows = torch.tensor([[0, 1, 9], [0, 3, 10], [4, 0, 13]])
    given = Triplets(store, store.names, ("colour", "kind"), *rows.T, torch.tensor([0, 1, 1]))
    model = ToyConditional(("kind", "colour"), 8).eval()
    found = evaluate_triplets(model, given)["toy_conditional"]
    assert set(found) == {"colour", "kind", "all"}
    assert found["all"] == pytest.approx((found["colour"] + 2 * found["kind"]) / 3)
    # Each triplet in the space of its condition, or in the only one that there is.
    spaces = unit(len(store.names), 2, 6)
    given = given._replace(anchors=torch.randint(9, (40,)), far=torch.randint(9, (40,)), near=torch.randint(9, (40,)))
    given = given._replace(condition=torch.arange(40) % 2)
    for vectors in (spaces, spaces[:, 1:]):
        right = {"colour": [], "kind": []}
        for a, f, n, c in zip(*(own.tolist() for own in given[3:])):
            own = vectors[:, c if vectors.shape[1] == 2 else 0]
            right[given.conditions[c]].append(bool(own[a] @ own[n] > own[a] @ own[f]))
        expected = {name: np.mean(shares) for name, shares in right.items()} | {
            "all": np.mean([*right["colour"], *right["kind"]])
        }
        assert score_triplets(vectors, given) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="has no condition for kind"):
        evaluate_triplets(ToyConditional(("colour",), 8), given)


def test_models_of_one_and_of_many_spaces(tmp_path):
    table = write_table(tmp_path)

    class MeanColour(nn.Module):
        """One space: the mean colour."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.pretrained_cfg = ToyConditional(("x",), 2).pretrained_cfg | {"architecture": "mean_colour"}

        def forward(self, x):
            return self.gain * x.mean(dim=(2, 3))

    found = evaluate_retrieval([MeanColour(), ToyConditional(("kind", "colour"), 8)], table)
    assert [row.model for row in found.rows] == ["random"] * 2 + ["mean_colour"] * 2 + ["toy_conditional"] * 4
    scores = {row.attribute: row.map for row in found.own("mean_colour")}
    assert scores["colour"] == 1.0
    assert scores["kind"] < 1.0
    assert found.matrix("random") is None
    matrix = found.matrix("toy_conditional")
    assert matrix.diagonal().tolist() == pytest.approx([row.map for row in found.own("toy_conditional")])
    assert matrix.shape == (2, 2)
    with pytest.raises(ConfigError, match="has no condition for kind, only for colour"):
        evaluate_retrieval(ToyConditional(("colour",), 8), table)
    draw_matrix(tmp_path / "matrix.png", matrix, found.attributes)
    with Image.open(tmp_path / "matrix.png") as drawn:
        assert drawn.size == (150 + 2 * 72, 150 + 2 * 72)


def test_command(tmp_path, capsys):
    table = write_table(tmp_path)
    assert cli.main(["evaluate", "retrieval", "--data", str(table), "--output", str(tmp_path / "rows.csv")]) == 0
    assert "by queries" in capsys.readouterr().out
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["attribute"] for row in rows] == ["colour", "kind", "mean", "by queries"]
    assert float(rows[2]["map"]) == pytest.approx((float(rows[0]["map"]) + float(rows[1]["map"])) / 2, abs=0.001)
    assert cli.main(["evaluate", "retrieval", "--data", str(table), "--attributes", "cut"]) == 2
    assert "no attribute cut. There are colour, kind" in capsys.readouterr().err
    assert cli.main(["evaluate", "retrieval", "--data", str(table), "--matrix", str(tmp_path / "m.png")]) == 2
    assert "got 0" in capsys.readouterr().err


def test_unreadable_images_are_left_out_and_named(tmp_path, capsys):
    table = write_table(tmp_path, copies=6)
    whole = evaluate_retrieval(ToyConditional(("colour", "kind"), 8), table)
    test = read_catalogue("table", table).part("test")
    first = test.images[0]
    (tmp_path / "images" / first).write_bytes(b"no image")
    torch.manual_seed(1)
    model = ToyConditional(("colour", "kind"), 8)
    found = evaluate_retrieval([model, model], table)
    assert [first in line for line in found.failures] == [True]
    spaces = embed_images(model.eval(), read_catalogue("table", table).images, test.images[1:])
    expected = score_part(spaces, test.take(torch.arange(1, 9)), ("colour", "kind"))
    assert found.own("toy_conditional") == found.own("toy_conditional (2)") == expected
    assert whole.failures == []
    with pytest.raises(DataError, match=first):
        embed_images(model, read_catalogue("table", table).images, test.images)
    for name in test.images[:6]:
        (tmp_path / "images" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"6 of the 9 images cannot be read"):
        evaluate_retrieval(model, table)


def test_unreadable_images_of_triplets(tmp_path):
    root = write_triplets(tmp_path)
    given = read_triplets(root, "test")
    model = ToyConditional(tuple(given.conditions), 8).eval()
    gone = given.names[3]
    (root / "ut-zap50k-images" / gone).write_bytes(b"no image")
    failures = []
    found = evaluate_triplets(model, root, part="test", failures=failures)["toy_conditional"]
    assert [gone in line for line in failures] == [True]
    own = given.take(torch.tensor([place for place, name in enumerate(given.names) if name != gone]))
    assert found == score_triplets(embed_images(model, own.images, own.names), own)


def test_models_that_embed_nothing_are_refused(tmp_path, capsys):
    table = str(write_table(tmp_path))
    stereo = timm.create_model("va_match_stereo_nano")
    safetensors.torch.save_file(stereo.state_dict(), tmp_path / "stereo.safetensors")
    for words, message in (
        (["va_span_ch26_x2"], "va_span_ch26_x2 cannot be used here: it is a 'restore' model"),
        ([str(tmp_path / "stereo.safetensors")], "cannot be used here: it is a 'stereo' model"),
    ):
        assert cli.main(["evaluate", "retrieval", *words, "--data", table]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    broken = ToyConditional(("colour", "kind"), 8)
    broken.heads[0].bias.data[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"heads\.0\.bias is not finite"):
        evaluate_retrieval(broken, table)
    with pytest.raises(InputError, match="image size must be"):
        evaluate_retrieval(ToyConditional(("colour", "kind"), 8), table, image_size=(0, 0))
    with pytest.raises(ConfigError, match="colour is given twice"):
        evaluate_retrieval([], table, attributes=["colour", "colour"])


def test_outputs_stay_and_names_may_be_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path)
    table.write_text(table.read_text().replace("colour", "[/colour]"))
    (tmp_path / "m.png").write_bytes(b"mine")
    evaluate = ["evaluate", "retrieval", "--data", str(table)]
    assert cli.main([*evaluate, "--output", "rows.csv"]) == 0
    assert "[/colour]" in capsys.readouterr().out
    for words, message in (
        (["--output", "rows.csv"], "rows.csv exists. Give --overwrite"),
        (["--output", "rows.txt"], "must end in .csv"),
        (["--matrix", "m.png"], "m.png exists. Give --overwrite"),
    ):
        assert cli.main([*evaluate, *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*evaluate, "--output", "rows.csv", "--overwrite"]) == 0
    assert (tmp_path / "m.png").read_bytes() == b"mine"


def test_trivial_baselines_have_their_numbers():
    if not PRODUCTS.is_dir():
        pytest.skip(f"{PRODUCTS} is not on this machine")
    from benchmarks.retrieval.retrieval_heads import ATTRIBUTES, TRIVIAL, trivial_features

    printed = {  # of the data's own README
        "random": [50.3, 26.8, 8.2, 11.7, 63.6, 47.0],
        "pixels": [55.1, 64.5, 35.0, 20.9, 66.3, 52.0],
        "histogram": [53.1, 40.4, 16.5, 28.2, 65.3, 50.3],
    }
    catalogue = read_catalogue("table", PRODUCTS / "attributes.csv", attributes=ATTRIBUTES, min_count=40)
    assert [len(values) for values in catalogue.values.values()] == [3, 14, 30, 16, 4, 4]
    test = catalogue.part("test")
    for name in TRIVIAL:
        found = score_part(trivial_features(name, catalogue, test)[:, None], test, catalogue.attributes)
        # Random ranks vary with the draw, and how the histogram's background was told is not printed.
        allowed = {"random": 0.3, "pixels": 0.15, "histogram": 0.45}[name]
        assert [100 * row.map for row in found] == pytest.approx(printed[name], abs=allowed)
        assert {row.queries + row.gallery for row in found} <= set(range(1400, 1501))
