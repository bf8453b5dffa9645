"""Per-image routers: labels, training, the control at equal cost, and routing."""

import pytest
import torch
import torch.nn.functional as F

from tests.frozen.toys import golden, images, vit
from visionattn.errors import InputError
from visionattn.frozen import export, using
from visionattn.frozen.policies import Reuse, TailOnly, Window
from visionattn.frozen.router import (
    FluxRouter,
    Routed,
    compare_router,
    offline_labels,
    route_scores,
    train_router,
)

TILES = {"query_tile": 4, "key_tile": 2}


def test_router_equals_flux():
    case = golden("flux_router")
    router = FluxRouter(8, int(case["pool_size"])).double()
    router.load_state_dict({name: torch.from_numpy(case[name.replace(".", "_")]) for name in router.state_dict()})
    found = router(torch.from_numpy(case["q"]))
    torch.testing.assert_close(found, torch.from_numpy(case["logits"]), rtol=0, atol=1e-12)
    assert found.argmax(1).tolist() == case["full"].tolist()


def test_flux_router_by_its_equations():
    router, q = FluxRouter(4, 2), torch.randn(3, 10, 2, 4)
    u = sum(q[:, n, h] for n in (0, 1, 8, 9) for h in (0, 1)) / 8
    first, second, *head = (m for m in router.modules() if isinstance(m, torch.nn.Linear))
    x = second(F.silu(first(u)))
    expected = head[2](F.silu(head[1](F.silu(head[0](x)))))
    torch.testing.assert_close(router(q), expected)
    assert sum(p.numel() for p in router.parameters()) == 36 * 16 + 17 * 4 + 2


def test_labels_are_the_cheapest_that_keep_the_score():
    scores = torch.tensor([[0.5, 0.99, 1.0], [0.995, 0.9, 1.0], [0.1, 0.2, 0.3]])
    assert offline_labels(scores).tolist() == [1, 0, 2]
    assert offline_labels(scores, torch.tensor([0.5, 1.0, 0.2])).tolist() == [0, 0, 1]
    assert offline_labels(scores, share=1.0).tolist() == [2, 2, 2]
    with pytest.raises(InputError, match=r"share must be in \(0, 1\]; got 0"):
        offline_labels(scores, share=0)


def test_router_learns_what_its_features_tell():
    features = torch.randn(60, 3)
    labels = (features[:, 1] > 0.3).long()
    router = train_router(features, labels, 2)
    assert (router(features).argmax(1) == labels).float().mean() > 0.9
    torch.testing.assert_close(router(features), train_router(features, labels, 2)(features))


def test_the_control_is_the_best_mixture_of_fixed_budgets():
    scores = torch.tensor([[0.0, 0.9, 1.0], [0.8, 0.5, 1.0]])  # means .4, .7, 1
    rows = {row["name"]: row for row in compare_router(scores, [1, 2, 3], torch.tensor([1, 0]), torch.tensor([2, 2]))}
    assert (rows["router"]["score"], rows["router"]["macs"]) == pytest.approx((0.85, 1.5))
    assert rows["fixed"]["score"] == pytest.approx(0.55)
    assert rows["labels"]["score"] == rows["fixed at the labels' cost"]["score"] == 1
    worse = torch.tensor([[0.5, 0.1, 0.9]])
    row = compare_router(worse, [1, 2, 3], torch.tensor([1]), torch.tensor([1]))[1]
    assert row["score"] == pytest.approx(0.7)  # half of the images at 1 and half at 3


def test_scores_and_routing():
    model, x = vit((8, 8)), images(4, (8, 8))
    policies = [TailOnly(**TILES), Reuse(0.5, **TILES, sources=[0, 0, 0]), None]
    scores, features = route_scores(model, [x[:1], x[1:]], policies)
    assert scores.shape == (4, 3)
    assert features.shape == (4, 16)
    assert (scores[:, 2] == 1).all()
    assert (scores[:, 0] < 1).all()

    class Fixed(torch.nn.Module):
        def forward(self, u):
            torch.testing.assert_close(u, features)
            return F.one_hot(torch.tensor([2, 0, 1, 0]), 3).float()

    with torch.no_grad():
        alone = []
        for policy in policies:
            if policy is None:
                alone.append(model(x))
                continue
            with using(model, policy):
                alone.append(model(x))
        with using(model, Routed(Fixed(), policies)) as reached:
            found = model(x)
    expected = torch.stack([alone[2][0], alone[0][1], alone[1][2], alone[0][3]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(reached.layers) == 3


def test_routing_is_not_exported(tmp_path):
    routed = Routed(train_router(torch.randn(8, 16), torch.arange(8) % 2, 2), [Window(**TILES), None])
    with pytest.raises(InputError, match="with visionattn"):
        routed(None, None, None, None, None)
    with pytest.raises(Exception, match="cannot be traced: trace one of its policies"):
        export(vit(depth=1), tmp_path / "model.onnx", routed)
