"""What sparse attention costs a frozen model: feature error and k-NN accuracy against multiply-accumulates.

The measurement behind `visionattn inspect --policy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["measure_policies"]


def measure_policies(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    labels: Tensor | None = None,
    policies: str | Sequence[str] = "all",
    budgets: Sequence[float] = (0.125,),
    *,
    layers: str | Sequence[str] = "*",
    query_tile: int = 8,
    key_tile: int = 4,
    tails: Sequence[bool] = (False, True),
) -> list[dict[str, Any]]:
    """Compare policies, the controls `strided` and `random` always among them, at equal budgets.

    Args:
        model: A frozen model; its `forward_features` is run where it has one.
        images: One batch (B, C, H, W), or batches of one size, which are read several times: a list.
        labels: Class of each image, int64 (n,), for k-NN accuracy by leaving one out; None leaves the accuracy out.
        policies: Names in `POLICIES`, or "all".
        budgets: Keys that a query reads as shares of all, in (0, 1].
        layers: Pattern of layers' names, or several.
        query_tile: Side of the tiles of queries that share a selection.
        key_tile: Side of the tiles of keys that are selected; must divide `query_tile`.
        tails: Whether tiles that are not selected take part as one pooled key each.

    Returns:
        Rows with the entries `policy`, `tail`, `budget`, `keys` (that a query reads on average), `macs` (of the
        attention products and the selection, per image, of the replaced layers), `macs_share` (of dense attention),
        `error` (relative error of the final patch features, mean over images), `error_low`, `error_high` (95 %
        interval), `accuracy`, `accuracy_low`, `accuracy_high` (k-NN; None without labels). The first row is "dense".

    Raises:
        InputError: A budget is outside (0, 1], a policy does not exist, or no layer was reached.
    """
    raise NotImplementedError
