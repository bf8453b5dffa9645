r"""Poolings for the evaluation of frozen backbones: efficient probing, and those that it is compared with.

A pooling maps the tokens of an image to one vector: X (B, N, D) -> y (B, out_dim). Here x_n is a token, g the mean of
the tokens, u a learned query, LN a layer norm, h a number of heads, MLP two layers D -> 4 D -> D with a GELU between,
and

    MHA_h(q, K, V) = concat over heads of softmax(q_i K_i^T / sqrt(D / h)) V_i      (B, M, D), q_i the i-th slice of q

Parameters, without the classifier, for N = H W patches:

    cls, gap    0                     siglip      12 D^2 + 10 D
    ep, ep_all  D^2 + M D             clip         4 D^2 + (N + 7) D
    aim          2 D^2 + D            simpool      2 D^2 + 2 D
    jepa        12 D^2 + 14 D         esimpool     2 D
    cae          4 D^2 + 10 D         cbam         D^2 / 8 + 100
    cait        12 D^2 + 18 D         dolg         D^2 + 4 D + 1
    coca         1349 D               dinovit     12 D^2 + 10 D
                                      abmilp       5 D^2 + 3 D + 1, plain D + 1

Source: "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", arXiv 2506.10178. Forms, sizes
and initial values are those of its authors' code; the papers named at each class can differ in them. The authors'
weights can be loaded after renaming, with the 1 x 1 convolutions of `dolg` flattened.

Deviations, and why. Rows that would be discarded are not computed (`coca`, `clip`), and a query is projected once
instead of once per image: the function is the same. A batch of one image keeps its batch dimension.
"""

import inspect
import re
from typing import Any

from visionattn.errors import UnknownNameError
from visionattn.probe.heads.poolings.base import Pooling
from visionattn.probe.heads.poolings.learned_query import Aim, Cae, Cait, Coca, Jepa, PatchProbing, Siglip, TokenProbing
from visionattn.probe.heads.poolings.own_weights import (
    AbMilp,
    Cbam,
    ClassToken,
    Clip,
    DinoBlock,
    Dolg,
    LinearFreeSimPool,
    Mean,
    SimPool,
)

__all__ = ["POOLINGS", "Pooling", "create_pooling"]

POOLINGS: dict[str, type[Pooling]] = {
    "cls": ClassToken,
    "gap": Mean,
    "ep": PatchProbing,
    "ep_all": TokenProbing,
    "aim": Aim,
    "jepa": Jepa,
    "cae": Cae,
    "cait": Cait,
    "coca": Coca,
    "siglip": Siglip,
    "clip": Clip,
    "simpool": SimPool,
    "esimpool": LinearFreeSimPool,
    "cbam": Cbam,
    "dolg": Dolg,
    "dinovit": DinoBlock,
    "abmilp": AbMilp,
}


def create_pooling(spec: str, dim: int, grid: tuple[int, int], **options: Any) -> Pooling:
    """Create a pooling by name.

    Args:
        spec: A name in `POOLINGS`, or `ep_M` or `ep_all_M` for M queries, such as `"ep_16"`.
        dim: Width D of the tokens.
        grid: Height and width of the grid of patches; most poolings do not use it.
        **options: Further arguments of the pooling's constructor, such as `num_heads`, `device` or `dtype`.

    Raises:
        UnknownNameError: The pooling does not exist.
        InputError: The pooling does not support this width.
    """
    queries = re.fullmatch(r"(ep|ep_all)_([1-9][0-9]*)", spec)
    if queries is not None:
        spec, options["num_queries"] = queries[1], int(queries[2])
    if spec not in POOLINGS:
        raise UnknownNameError(
            f"There is no pooling {spec!r}; use one of {', '.join(POOLINGS)}, or ep_M or ep_all_M for M queries."
        )
    constructor: Any = POOLINGS[spec]
    if "grid" in inspect.signature(constructor).parameters:
        options["grid"] = grid
    return constructor(dim, **options)
