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
