"""Networks of other libraries as backbones: any function, torchvision models, vision models of transformers.

Each becomes a module with the token interface of timm's models: `forward_intermediates`, `num_prefix_tokens`,
`has_class_token` and `pretrained_cfg`. A layer returns maps (B, D, H, W), or tokens (B, P + N, D) whose first P are the
class token and registers, or features (B, D), which count as one patch token.
"""

from torch import nn

from visionattn.adapters.base import AdaptedModel
from visionattn.adapters.function import FunctionModel
from visionattn.adapters.torchvision import CLASSIFIERS, TorchvisionModel
from visionattn.adapters.transformers import TransformersModel

__all__ = ["CLASSIFIERS", "AdaptedModel", "FunctionModel", "TorchvisionModel", "TransformersModel", "adapt"]


def adapt(model: nn.Module) -> nn.Module:
    """A module as a backbone: those of torchvision or transformers are adapted, any other is returned unchanged."""
    if hasattr(model, "forward_intermediates"):
        return model
    module = type(model).__module__
    if module.startswith("torchvision.models"):
        return TorchvisionModel(model)
    if module.startswith("transformers."):
        return TransformersModel(model)
    return model
