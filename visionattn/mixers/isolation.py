r"""Isolation and reposition attention: several subjects in one generated image, each with its reference image.

A query i of the target may attend to

    key j of the target     unless i and j are in the masks of two different subjects         (isolation)
    key j of reference r    only if i is in r's subject in the target, and j in r's repositioned subject

Repositioning sets the reference's hidden states outside the subject to zero, crops the box around the subject, resizes
it (nearest) to the box around the subject in the target, and pastes it onto zeros; the mask is treated in the same way.
This happens before the projections of keys and values.

Limits: attention does not depend on the order of keys, so moving them has no effect unless queries and keys contain
positions. If the boxes differ in size, keys of the reference are repeated or dropped, which amounts to a bias of about
log(target area / reference area) on the reference's logits. Aligning them would need shifted position codes.

These are functions, not mixers of `MIXERS`: a backbone has neither subjects nor references. They are meant for
generators whose self-attention accepts a mask; this package contains no such model.

Source: IR-Diffusion ("DreamStory") and its authors' code. Masks of subjects must not overlap, as in the code, which
removes overlaps first: a token in two masks could not attend to itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError, shorten

__all__ = ["isolation_mask", "reference_mask", "reposition", "subject_box"]

Box = tuple[slice, slice]


def isolation_mask(masks: Tensor) -> Tensor:
    """Mask of the target's own keys that its queries may attend to.

    Args:
        masks: Masks of the subjects, bool (S, H, W); they must not overlap.

    Returns:
        Bool (H W, H W), True where attention is allowed.

    Raises:
        InputError: The masks overlap.
    """
    inside = masks.bool().flatten(1)
    if bool((inside.sum(dim=0) > 1).any()):
        raise InputError("The masks of subjects overlap: give each token to one subject.")
    of_another = torch.stack([inside[:s].any(0) | inside[s + 1 :].any(0) for s in range(len(inside))])  # (S, H W)
    return ~(inside[:, :, None] & of_another[:, None, :]).any(dim=0)


def reference_mask(target: Tensor, repositioned: Tensor) -> Tensor:
    """Mask of the references' keys that the target's queries may attend to.

    Args:
        target: Masks of the subjects in the target, bool (S, H, W).
        repositioned: Masks of the same subjects in their references after `reposition`, bool (S, H, W).

    Returns:
        Bool (H W, S H W), True where attention is allowed; the references' keys are concatenated.
    """
    queries, keys = target.bool().flatten(1), repositioned.bool().flatten(1)
    return (queries[:, :, None] & keys[:, None, :]).transpose(0, 1).flatten(1)


def subject_box(mask: Tensor) -> Box:
    """Bounding box of a mask, bool (H, W), as a slice of rows and a slice of columns.

    Raises:
        InputError: The mask is empty.
    """
    rows, columns = (mask.bool().any(dim=axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise InputError("The mask of a subject is empty: it has no box.")
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def reposition(x: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Move a reference's subject to its position in the target (see the module).

    Args:
        x: Hidden states of the reference, (H W, C), or a mask (H W, 1).
        reference: Mask of the subject in the reference, bool (H, W).
        target: Mask of the subject in the target, bool (H, W).

    Returns:
        (H W, C), zeros outside the target's box.

    Raises:
        InputError: A mask is empty, or the shapes do not match.
    """
    height, width = reference.shape
    if target.shape != reference.shape or x.ndim != 2 or len(x) != height * width:
        raise InputError(
            f"reposition takes tokens ({height * width}, C) and masks ({height}, {width}); got "
            f"{shorten(tuple(x.shape))} and {tuple(target.shape)}."
        )
    rows, columns = subject_box(target)
    subject = reference.bool().flatten()[:, None]
    grid = (x * subject).unflatten(0, (height, width)).permute(2, 0, 1)[None]  # (1, C, H, W)
    cut = grid[(slice(None), slice(None), *subject_box(reference))]
    size = (rows.stop - rows.start, columns.stop - columns.start)
    pasted = torch.zeros_like(grid)
    pasted[:, :, rows, columns] = F.interpolate(cut, size=size, mode="nearest")
    return pasted[0].permute(1, 2, 0).flatten(0, 1)
