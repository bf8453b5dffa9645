"""`visionattn.probe`: evaluate a frozen backbone from one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

from visionattn.probe.comparison import Comparison
from visionattn.probe.report.report import Report
from visionattn.probe.report.tasks import TaskReport
from visionattn.probe.running import BackboneSource, run_probe
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.several import run_probes

__all__ = ["probe", "run_probe", "run_probes"]


@overload
def probe(
    backbone: BackboneSource, data: Any, *, settings: ProbeSettings | None = ..., progress: bool = ..., **options: Any
) -> Report | TaskReport: ...
@overload
def probe(
    backbone: Sequence[BackboneSource],
    data: Any,
    *,
    settings: ProbeSettings | None = ...,
    progress: bool = ...,
    **options: Any,
) -> Comparison: ...
def probe(
    backbone: BackboneSource | Sequence[BackboneSource],
    data: Any,
    *,
    settings: ProbeSettings | None = None,
    progress: bool = True,
    **options: Any,
) -> Report | TaskReport | Comparison:
    """Evaluate a frozen backbone by k-NN and by heads trained on its tokens, or compare several backbones.

    Args:
        backbone: Name in timm's registry, weight file or folder, `torchvision/NAME`, a folder of transformers, a
            module, which is copied, or a `Backbone`, such as `Backbone.from_callable` makes; or a list of these.
        data: Folder of images by class, or of the data of another task; a dataset: "digits", or "mnist", "torch/...",
            "hfds/..." with `root`; or the training and the test images, (train, test). Each of these is an array
            (N, H, W) or (N, H, W, C) of uint8 with its labels, (images, labels), or a dataset of (image, label), where
            an image is a PIL image, a uint8 array (H, W) or (H, W, C), a uint8 tensor (C, H, W), or a float tensor
            (C, H, W) as the backbone takes it, and labels are whole numbers from 0.
        settings: Settings; None: the defaults.
        progress: Show what is read and the progress, in a terminal, a notebook or a log.
        **options: Fields of `ProbeSettings`, which override those of `settings`: `epochs=10`, `device="cpu"` ...

    Returns:
        The report; for tasks other than classification, a `TaskReport`. If `output` names a folder, it is also written,
        with heads, maps and the ONNX file, and the same call resumes an interrupted run. For several backbones, their
        comparison; `output` then contains it, with a sub-folder for each report.

    Raises:
        CheckpointError: The weights could not be read, or do not match the model.
        DataError: The images cannot be read, or have fewer than two classes.
        InputError: A setting is not accepted, or the backbone cannot be probed.
        MissingPackageError: `pip install 'visionattn[train]'` is needed.
        StorageError: There is not enough space for the tokens, or a file could not be written.
        UnknownNameError: No model has this name.
    """
    settings = replace(settings or ProbeSettings(), **options)
    if not isinstance(backbone, (list, tuple)):
        return run_probe(backbone, data, settings, progress=progress)  # type: ignore[arg-type]
    return run_probes(backbone, data, settings, progress=progress)
