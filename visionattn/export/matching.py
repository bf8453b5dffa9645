"""Pattern matching of onnxscript's optimizer, without a search whose time is quadratic in the size of the graph.

For a pattern with several last nodes, such as two slices that make one split, the optimizer lists all nodes of the
graph at each of its nodes, and only then compares that node with the first of the several: most of its time for a
network of thousands of nodes. Here the comparison comes first. The same patterns match, so that the file is the same,
byte for byte. Each comparison also checks the time limit: the optimizer is the longest part of translating that can be
interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from visionattn.export.budget import Budget

__all__ = ["first_node_first"]


@contextmanager
def first_node_first(budget: Budget) -> Iterator[None]:
    """Within this context, exports do without the search, and end in `TimeLimitError` after the time limit.

    Other versions of onnxscript may have no such class.
    """
    try:
        from onnxscript.rewriter.pattern import MatchResult, SimplePatternMatcher
    except ImportError:
        yield
        return
    comparing = _comparing_first(SimplePatternMatcher.match, MatchResult, budget)
    with mock.patch.object(SimplePatternMatcher, "match", comparing):
        yield


def _comparing_first(match: Callable[..., Any], no_match: Callable[[], Any], budget: Budget) -> Callable[..., Any]:
    @functools.wraps(match)
    def matched(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        budget.check("translating")
        last: Any = getattr(self.pattern, "output_nodes", ())
        if len(last) > 1 and not last[0].matches(node, failed := no_match()):
            return failed
        return match(self, model, graph, node, **options)

    return matched
