"""Evaluate a frozen backbone: its tokens are pooled into one vector per image for a small head.

`Backbone` reads the tokens; `extract` stores them, or `LiveFeatures` computes them in each pass; `sweep`, `few_shot`
and `nearest_neighbours` evaluate them. The package can be called: `visionattn.probe(backbone, data)` does all of this
and returns a report. Intervals and calibration need `pip install 'visionattn[train]'`.
"""

from visionattn.lazy import lazily, make_callable
from visionattn.probe.few_shot import few_shot
from visionattn.probe.heads.banks import HeadSpec, grid
from visionattn.probe.heads.files import load_head
from visionattn.probe.heads.poolings import POOLINGS, create_pooling
from visionattn.probe.knn import nearest_neighbours
from visionattn.probe.settings import ProbeSettings
from visionattn.probe.sweep import sweep
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.features import LiveFeatures, StoredFeatures, extract

make_callable(__name__, "visionattn.probe.api")
# Reading image files requires Lightning.
__getattr__ = lazily(
    __name__,
    {
        "apply_head": "visionattn.probe.applying",
        "head_network": "visionattn.probe.network",
        "open_classifier": "visionattn.probe.applying",
    },
)

# `sweep` and `few_shot` are functions here: other names of the modules need `from ... import`.
__all__ = [
    "POOLINGS",
    "Backbone",
    "HeadSpec",
    "LiveFeatures",
    "ProbeSettings",
    "StoredFeatures",
    "apply_head",
    "create_pooling",
    "extract",
    "few_shot",
    "grid",
    "head_network",
    "load_head",
    "nearest_neighbours",
    "open_classifier",
    "sweep",
]
