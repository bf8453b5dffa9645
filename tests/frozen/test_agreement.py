"""Attention maps against occlusion."""

from pathlib import Path

import numpy as np
import pytest
import torch

from visionattn.errors import InputError
from visionattn.frozen.agreement import (
    agreement,
    draw_masks,
    leave_one_out,
    occlude,
    occlusion_change,
    pearson,
    saliency,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "dossiers" / "golden" / "agreement.npz"


def test_saliency_of_the_golden_case():
    if not GOLDEN.exists():
        pytest.skip("the golden numbers are not here")
    case = {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}

    def predict(kept):
        keys = torch.where(kept[..., None], case["keys"], case["baseline"])
        weights = (keys @ case["query"] / 8**0.5).softmax(-1)
        return (weights[:, None] @ keys)[:, 0] @ case["classifier"]

    whole = predict(torch.ones(1, 25, dtype=torch.bool))[0]
    changes = occlusion_change(whole, predict(case["masks"]), logits=True)
    torch.testing.assert_close(changes, case["kl"], atol=1e-12, rtol=0)
    found = saliency(changes, case["masks"])
    torch.testing.assert_close(found, case["saliency"], atol=1e-12, rtol=0)
    assert float(pearson(case["attention"], found)) == pytest.approx(float(case["pearson"]), abs=1e-12)
    alone = occlusion_change(whole, predict(~torch.eye(25, dtype=torch.bool)), logits=True)
    torch.testing.assert_close(alone, case["leave_one_out"], atol=1e-12, rtol=0)


def reads_one_patch(images):
    """Two logits that depend on the patch in row 1, column 2 of 3 x 4 alone."""
    value = images[:, 0, 2:4, 4:6].mean(dim=(1, 2))
    return torch.stack([5 * value, -5 * value], dim=1)


def striking_images():
    images = torch.rand(3, 1, 6, 8, generator=torch.Generator().manual_seed(0)) / 10
    images[:, 0, 2:4, 4:6] = 1.0
    return images


def test_what_takes_the_patch_away_carries_the_score():
    images = striking_images()
    right = torch.zeros(3, 12)
    right[:, 6] = 1
    found = agreement(reads_one_patch, images, right, (3, 4), logits=True, masks=300)
    assert found.saliency.argmax(1).tolist() == [6, 6, 6]
    assert found.mean > 0.9
    assert found.interval.low > 0.9
    wrong = agreement(reads_one_patch, images, 1 - right, (3, 4), logits=True, masks=300)
    assert wrong.mean == pytest.approx(-found.mean)
    assert (found.deletion["map"] < found.deletion["random"]).all()
    assert (found.deletion["map"] < wrong.deletion["map"]).all()
    assert (found.insertion["map"] > wrong.insertion["map"]).all()
    np.testing.assert_allclose(found.insertion["saliency"], found.insertion["map"])
    both = agreement(reads_one_patch, images, right, (3, 4), logits=True, masks=300, others={"wrong": 1 - right})
    np.testing.assert_array_equal(both.deletion["map"], found.deletion["map"])
    np.testing.assert_array_equal(both.deletion["wrong"], wrong.deletion["map"])
    np.testing.assert_array_equal(both.correlation(1 - right), wrong.pearson)
    assert leave_one_out(reads_one_patch, images[0], (3, 4), logits=True).argmax() == 6


def test_removed_patches_get_the_mean_of_the_image():
    image = torch.arange(16.0).reshape(1, 4, 4)
    masked = occlude(image, torch.tensor([[True, False, False, True]]), (2, 2))
    assert masked[0, 0].tolist() == [[0, 1, 7.5, 7.5], [4, 5, 7.5, 7.5], [7.5, 7.5, 10, 11], [7.5, 7.5, 14, 15]]


def test_features_are_compared_by_their_cosine():
    whole = torch.tensor([1.0, 0.0])
    changes = occlusion_change(whole, torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), logits=False)
    torch.testing.assert_close(changes, torch.tensor([0.0, 1.0, 2.0]))


def test_a_patch_that_no_mask_takes_away_has_no_saliency():
    assert saliency(torch.tensor([2.0, 4.0]), torch.tensor([[True, False], [True, False]])).tolist() == [0, 3]


def test_masks_keep_half():
    masks = draw_masks(400, 50)
    assert float(masks.double().mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(masks, draw_masks(400, 50))


def test_maps_must_fit():
    with pytest.raises(InputError, match=r"shape \(3, 12\) .*; got \(3, 11\)"):
        agreement(reads_one_patch, striking_images(), torch.zeros(3, 11), (3, 4), logits=True)
    with pytest.raises(InputError, match=r"got \(2, 12\)"):
        agreement(
            reads_one_patch, striking_images(), torch.zeros(3, 12), (3, 4), logits=True,
            others={"few": torch.zeros(2, 12)},
        )  # fmt: skip
    with pytest.raises(InputError, match="at least 2"):
        agreement(reads_one_patch, striking_images(), torch.zeros(3, 12), (3, 4), logits=True, masks=1)
