"""What PyTorch's ONNX exporter does in every export, done once: half of the time of a small one.

The files stay the same, byte for byte. Tests register their operators when they are imported, before the first export.
"""

import functools
import sys


def hasten_exports() -> None:
    """Quicken the exporter, once something has imported it."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is None:
        return
    for module, name in (
        (getattr(registration, "onnxscript_apis", None), "get_torchlib_ops"),  # parses 500 functions of onnxscript
        (getattr(registration, "_schemas", None), "op_signature_from_function"),  # of each of them
        (sys.modules.get("torch._export.utils"), "_materialize_cpp_cia_ops"),  # for each namespace of operators
    ):
        function = getattr(module, name, None)
        if function is not None and not hasattr(function, "cache_info"):
            setattr(module, name, functools.cache(function))
    matcher = getattr(sys.modules.get("onnxscript.rewriter._matcher"), "SimplePatternMatcher", None)
    if matcher is not None and not hasattr(matcher.match, "__wrapped__"):
        matcher.match = begin_with_the_first_node(matcher.match)


def begin_with_the_first_node(match):
    """Fail at once where the first node of a pattern with several outputs is another operation.

    The optimizer lists all nodes of the graph first, at each of its nodes: a time that grows with the square of both.
    """
    from onnxscript.rewriter._basics import MatchResult

    @functools.wraps(match)
    def matched(self, model, graph, node, **options):
        result = MatchResult()
        if not self.pattern.has_single_output_node and not self.pattern.output_nodes[0].matches(node, result):
            return result
        return match(self, model, graph, node, **options)

    return matched
