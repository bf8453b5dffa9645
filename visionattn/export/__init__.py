"""Verified ONNX files: export, check against PyTorch, run. Needs `pip install 'visionattn[export]'`."""

from visionattn.export.check import CheckRow, check_onnx, print_rows
from visionattn.export.onnx import OnnxFile, export_onnx
from visionattn.export.runtime import OnnxModel, run

__all__ = ["CheckRow", "OnnxFile", "OnnxModel", "check_onnx", "export_onnx", "print_rows", "run"]
