"""Verified ONNX files: export, check against PyTorch, run. Requires `pip install 'visionattn[export]'`.

`visionattn.export(MODEL, FILE)` calls `visionattn.export.api.export`.
"""

from visionattn.export.check import CheckRow, check_onnx, print_rows
from visionattn.export.onnx import OnnxFile, export_onnx
from visionattn.export.retrieval import OnnxRetrieval, export_retrieval
from visionattn.export.runtime import OnnxModel, run
from visionattn.lazy import make_callable

make_callable(__name__, "visionattn.export.api")

__all__ = [
    "CheckRow",
    "OnnxFile",
    "OnnxModel",
    "OnnxRetrieval",
    "check_onnx",
    "export_onnx",
    "export_retrieval",
    "print_rows",
    "run",
]
