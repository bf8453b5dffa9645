r"""Exact ranking by cosine similarity, and the metrics of retrieval.

A query ranks the gallery by decreasing cosine similarity; ties keep the gallery's order. With the items of the query's
label at the ranks r_1 < ... < r_R of G:

    AP       = (1 / R) \sum_i  i / r_i           over the whole gallery
    recall@k = fraction of queries with r_1 <= k    (the points of the CMC curve)

The ranking leaves out queries whose label does not occur in the gallery, gallery items without a label, and gallery
items with the query's label and source: in re-identification, views of the same camera; otherwise the query itself. mAP
is the mean of AP over an attribute's queries. The mean over attributes is plain, or weighted by their numbers of
queries (as in ASEN).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.data.retrieval.catalogue import MISSING, Part
from visionattn.data.retrieval.catalogue_files import Triplets
from visionattn.errors import DataError, InputError

__all__ = ["AttributeScore", "Ranked", "means", "rank", "score", "score_part", "score_triplets", "triplet_accuracy"]

CELLS = 2**24  # elements per chunk of the similarity matrix
RECALL_AT = (1, 5, 10)


class Ranked(NamedTuple):
    """For each query with a match: average precision, float64 (Q,), and rank r_1 of the first match, from 1, (Q,)."""

    average_precision: Tensor
    first: Tensor

    def recall(self, k: int) -> float:
        """Fraction of queries with a match among the first k; NaN without queries."""
        return (self.first <= k).double().mean().item()


class AttributeScore(NamedTuple):
    """Scores of one attribute: numbers of queries and gallery items; mAP and recall in 0..1.

    A mean over attributes has the sum of their queries and the size of the largest gallery.
    """

    attribute: str
    queries: int
    gallery: int
    map: float
    recall_1: float
    recall_5: float
    recall_10: float


def rank(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    query_sources: Tensor | None = None,
    gallery_sources: Tensor | None = None,
) -> Ranked:
    """Rank the gallery for each query, exactly, in chunks of queries.

    Args:
        queries: (Q, E), compared by inner product: L2-normalise them for cosine similarity.
        gallery: (G, E).
        query_labels: int64 (Q,); `MISSING` leaves a query out.
        gallery_labels: int64 (G,); `MISSING` leaves an item out.
        query_sources: int64 (Q,) or None.
        gallery_sources: int64 (G,) or None. Items with the query's label and source are left out.

    Raises:
        InputError: An embedding is not finite.
    """
    asked, offered = query_labels != MISSING, gallery_labels != MISSING
    queries, query_labels = queries[asked], query_labels[asked]
    gallery, gallery_labels = gallery[offered], gallery_labels[offered]
    if not (queries.isfinite().all() and gallery.isfinite().all()):
        raise InputError("An embedding is not finite, so it cannot be ranked.")
    same_source = query_sources is not None and gallery_sources is not None
    sources = (query_sources[asked], gallery_sources[offered]) if same_source else None  # type: ignore[index]
    size = len(gallery)
    places = torch.arange(1, size + 1, dtype=torch.float64, device=gallery.device)
    precisions = [torch.zeros(0, dtype=torch.float64, device=gallery.device)]
    firsts = [torch.zeros(0, dtype=torch.int64, device=gallery.device)]
    for rows in torch.arange(len(queries), device=gallery.device).split(max(1, CELLS // max(size, 1))):
        cosines = queries[rows] @ gallery.T
        relevant = query_labels[rows, None] == gallery_labels
        if sources is not None:
            left_out = relevant & (sources[0][rows, None] == sources[1])
            cosines = cosines.masked_fill(left_out, -torch.inf)  # so that they come last
            relevant = relevant & ~left_out
        relevant, cosines = relevant[found := relevant.any(dim=1)], cosines[found]
        if not len(relevant):
            continue
        hits = relevant.gather(1, cosines.argsort(dim=1, descending=True, stable=True))
        precision = hits.cumsum(dim=1) / places
        precisions.append((precision * hits).sum(dim=1) / hits.sum(dim=1))
        firsts.append(hits.int().argmax(dim=1) + 1)
    return Ranked(torch.cat(precisions), torch.cat(firsts))


def score(embeddings: Tensor, part: Part, column: int, name: str) -> AttributeScore:
    """Score the embeddings (N, E) of a split's items by the attribute in `column`, called `name`.

    Raises:
        DataError: No query has a match.
    """
    labels, sources = part.labels[:, column].to(embeddings.device), part.sources
    is_query, is_gallery = part.is_query.to(embeddings.device), part.is_gallery.to(embeddings.device)
    given = (None, None) if sources is None else (sources.to(labels)[is_query], sources.to(labels)[is_gallery])
    found = rank(embeddings[is_query], embeddings[is_gallery], labels[is_query], labels[is_gallery], *given)
    queries = len(found.first)
    if not queries:
        raise DataError(f"No query has a match for the attribute {name} in the gallery.")
    gallery = int((labels[is_gallery] != MISSING).sum())
    return AttributeScore(name, queries, gallery, found.average_precision.mean().item(), *map(found.recall, RECALL_AT))


def score_part(embeddings: Tensor, part: Part, attributes: tuple[str, ...]) -> list[AttributeScore]:
    """Score each attribute by its own embeddings (N, C, E), or by shared ones (N, 1, E).

    Raises:
        DataError: No query of an attribute has a match.
    """
    own = embeddings.shape[1] > 1
    return [score(embeddings[:, column if own else 0], part, column, name) for column, name in enumerate(attributes)]


def means(scores: list[AttributeScore]) -> tuple[AttributeScore, AttributeScore]:
    """Return the plain mean over attributes and the mean weighted by their numbers of queries."""
    queries, gallery = sum(row.queries for row in scores), max(row.gallery for row in scores)
    shares = [(row.map, row.recall_1, row.recall_5, row.recall_10) for row in scores]
    plain = [sum(values) / len(scores) for values in zip(*shares)]
    weighted = [sum(value * row.queries for value, row in zip(values, scores)) / queries for values in zip(*shares)]
    return AttributeScore("mean", queries, gallery, *plain), AttributeScore("by queries", queries, gallery, *weighted)


def triplet_accuracy(anchors: Tensor, far: Tensor, near: Tensor) -> Tensor:
    """Whether each anchor (T, E) has a larger inner product with its near than its far item (T, E): bool (T,)."""
    return (anchors * near).sum(dim=-1) > (anchors * far).sum(dim=-1)


def score_triplets(embeddings: Tensor, given: Triplets) -> dict[str, float]:
    """Fraction of correct triplets per condition, and of all under "all"; conditions without triplets are left out.

    Args:
        embeddings: (N, C, E) of the images, one space per condition, or (N, 1, E), one shared space.
        given: At least one triplet.
    """
    spaces = given.condition if embeddings.shape[1] > 1 else 0
    anchors, far, near = (embeddings[rows, spaces] for rows in (given.anchors, given.far, given.near))
    right = triplet_accuracy(anchors, far, near).double().cpu()
    by_condition = ((name, right[given.condition == number]) for number, name in enumerate(given.conditions))
    return {name: own.mean().item() for name, own in by_condition if len(own)} | {"all": right.mean().item()}
