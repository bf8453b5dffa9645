"""Models by name and from weight files, in rooms that a file walks through once.

- `weight_file`: a file that was read: its card, the model it states, its weights
- `creating`: a model by its name
- `by_shapes`: the model of bare weights, found by their shapes
- `building`: the model of a file, within the bounds of its weights
- `loading`: `load`, which is all of these in order

Every error of a weight file is named in `weight_file`.
"""

from visionattn.checkpoints.creating import create, create_pretrained
from visionattn.checkpoints.loading import load
from visionattn.checkpoints.weight_file import WeightFile, classifier_keys, load_weights, read_card
from visionattn.hub import HOSTED

__all__ = [
    "HOSTED",
    "WeightFile",
    "classifier_keys",
    "create",
    "create_pretrained",
    "load",
    "load_weights",
    "read_card",
]
