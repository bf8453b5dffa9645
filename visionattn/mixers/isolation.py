r"""Isolation and reposition attention: several subjects in one generated image, each with its reference image.

A target's query i may read, of the target's own tokens and of reference r's,

    own key j          unless i and j lie in the masks of two different subjects         (isolation)
    key j of r         only if i lies in r's subject in the target, and j in r's subject, repositioned

Reposition sets the reference's hidden states outside of the subject to zero, cuts out the box around it, resizes this
(nearest) to the box around the subject in the target, and pastes it on zeros; the mask likewise. It is done before the
projections of keys and values.

What it can do: attention does not see the order of keys, so that moving them changes nothing unless positions are in
queries and keys. Where the boxes differ in size it repeats or drops keys of the reference, which is about a bias of
log(target area / reference area) on the reference's logits. A shift of position codes is what would align them.

These are functions, not a mixer of `MIXERS`: a backbone has neither subjects nor references. They belong to generators
whose self-attention takes a mask; there is none among this package's models.

Source: IR-Diffusion ("DreamStory") and its authors' code. Masks of subjects must not overlap, as in the code, which
removes overlaps first: a token in two masks would be cut off from itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import InputError, shorten

__all__ = ["isolation_mask", "reference_mask", "reposition", "subject_box"]

Box = tuple[slice, slice]


def isolation_mask(masks: Tensor) -> Tensor:
    """Which own keys a target's queries may read.

    Args:
        masks: Masks of the subjects, bool (S, H, W), which do not overlap.

    Returns:
        Bool (H W, H W), true where attention is allowed.

    Raises:
        InputError: Masks overlap.
    """
    inside = masks.bool().flatten(1)
    if bool((inside.sum(dim=0) > 1).any()):
        raise InputError("The masks of subjects overlap: give each token to one subject.")
    of_another = torch.stack([inside[:s].any(0) | inside[s + 1 :].any(0) for s in range(len(inside))])  # (S, H W)
    return ~(inside[:, :, None] & of_another[:, None, :]).any(dim=0)


def reference_mask(target: Tensor, repositioned: Tensor) -> Tensor:
    """Which keys of the references a target's queries may read.

    Args:
        target: Masks of the subjects in the target, bool (S, H, W).
        repositioned: Masks of the same subjects in their references after `reposition`, bool (S, H, W).

    Returns:
        Bool (H W, S H W), references one after the other.
    """
    queries, keys = target.bool().flatten(1), repositioned.bool().flatten(1)
    return (queries[:, :, None] & keys[:, None, :]).transpose(0, 1).flatten(1)


def subject_box(mask: Tensor) -> Box:
    """Rows and columns of the box around a mask, bool (H, W).

    Raises:
        InputError: The mask is empty.
    """
    rows, columns = (mask.bool().any(dim=axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise InputError("The mask of a subject is empty: it has no box.")
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def reposition(x: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """Move a reference's subject to where it is in the target (see the module).

    Args:
        x: Hidden states of the reference, (H W, C), or a mask (H W, 1).
        reference: Mask of the subject in the reference, bool (H, W).
        target: Mask of the subject in the target, bool (H, W).

    Returns:
        (H W, C), zeros outside of the target's box.

    Raises:
        InputError: A mask is empty, or the shapes do not fit.
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
