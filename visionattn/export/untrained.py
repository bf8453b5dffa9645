"""Random weights for a model without published ones."""

from __future__ import annotations

import torch
from timm.models import get_model_input_config
from torch import nn
from torch.optim.swa_utils import update_bn

__all__ = ["draw_random_weights"]


def draw_random_weights(model: nn.Module, size: tuple[int, int] | None) -> None:
    """Initialise an untrained model so that its output depends on its image; otherwise the check proves nothing."""
    # A layer initialised to zero, as in classifiers, would hide everything before it. Branches that end in batch norm
    # stay small: with larger ones, deep networks of random weights amplify rounding errors beyond the tolerance.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 0.01)
        # Untrained batch norm does not normalise, so the signal would vanish over many layers.
        channels, *default = get_model_input_config(model)["input_size"]
        update_bn([torch.randn(2, channels, *(size or default))], model)
