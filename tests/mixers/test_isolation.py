"""Isolation and reposition attention."""

from pathlib import Path

import numpy as np
import pytest
import torch

from visionattn.errors import InputError
from visionattn.mixers.isolation import isolation_mask, reference_mask, reposition, subject_box

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "dossiers" / "golden" / "ir_diffusion.npz"


@pytest.fixture(scope="module")
def case():
    if not GOLDEN.exists():
        pytest.skip("the golden numbers are not here")
    return {name: torch.from_numpy(np.asarray(array)) for name, array in np.load(GOLDEN).items()}


def test_hidden_states_and_masks_are_repositioned(case):
    target, reference = case["target_masks"].bool(), case["reference_masks"].bool()
    got = case["hidden"].clone()
    for subject in range(2):
        moved = reposition(reference[subject].flatten()[:, None].double(), reference[subject], target[subject])
        assert torch.equal(moved[:, 0], case["repositioned_masks"][subject].flatten())
        for first in (0, 3):  # without and with the condition
            got[first + subject] = reposition(got[first + subject], reference[subject], target[subject])
    torch.testing.assert_close(got, case["repositioned"], atol=1e-6, rtol=0)  # which was resized in float32


def test_own_keys_of_other_subjects_are_not_read(case):
    mask = isolation_mask(case["target_masks"].bool())
    logits = case["q"][10:] @ case["k"][10:].transpose(1, 2) * case["scale"]  # two heads of the target
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, case["isolated_attention"], atol=1e-12, rtol=0)


def test_references_are_read_by_their_subject(case):
    target = case["target_masks"].bool()
    mask = torch.cat([reference_mask(target, case["repositioned_masks"].bool()), isolation_mask(target)], dim=1)
    keys, values = (torch.cat(list(case[name].unflatten(0, (3, 2))), dim=1) for name in ("keys", "values"))
    logits = (case["q_target"] @ keys.transpose(1, 2) * case["scale"]).masked_fill(~mask, -torch.inf)
    output = (logits.softmax(-1) @ values).transpose(0, 1).flatten(1)
    torch.testing.assert_close(output, case["output"][0], atol=1e-12, rtol=0)


def test_background_reads_everything_and_is_read_by_all():
    masks = torch.zeros(2, 1, 4, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 0, 1] = True
    assert isolation_mask(masks).tolist() == [
        [True, False, True, True],
        [False, True, True, True],
        [True, True, True, True],
        [True, True, True, True],
    ]


def test_boxes_of_equal_size_only_change_the_order_of_keys():
    reference, target = torch.zeros(2, 4, 4, dtype=torch.bool).unbind()
    reference[:2, :2] = target[2:, 1:3] = True
    x = torch.randn(16, 3)
    moved = reposition(x, reference, target)
    assert torch.equal(moved[target.flatten()], x[reference.flatten()])
    assert not moved[~target.flatten()].any()


def test_boxes_of_one_column_are_taken():
    reference, target = torch.zeros(2, 4, 4, dtype=torch.bool).unbind()
    reference[1:3, 2] = target[:, :2] = True
    assert subject_box(reference) == (slice(1, 3), slice(2, 3))
    x = torch.arange(16.0)[:, None]
    got = reposition(x, reference, target)[:, 0].unflatten(0, (4, 4))
    assert got.tolist() == [[6, 6, 0, 0], [6, 6, 0, 0], [10, 10, 0, 0], [10, 10, 0, 0]]


def test_mistakes_are_named():
    full = torch.ones(2, 2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="overlap"):
        isolation_mask(full)
    with pytest.raises(InputError, match="is empty"):
        subject_box(~full[0])
    with pytest.raises(InputError, match="takes tokens"):
        reposition(torch.zeros(3, 1), full[0], full[0])
