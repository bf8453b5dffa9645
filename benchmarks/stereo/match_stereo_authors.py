"""The authors' MatchStereo from a checkout of their repository, for comparison with ours."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import timm
import torch
from torch import nn

__all__ = ["cuda_operator_built", "network", "use"]


def use(folder: Path) -> None:
    """Let the packages of the checkout be imported, and the CUDA operator if it was built in its folder `models`.

    They import helpers from where older timm had them.
    """
    layers, helpers, registry = (ModuleType(f"timm.models.{name}") for name in ("layers", "layers.helpers", "registry"))
    layers.__dict__.update(vars(timm.layers))
    layers.helpers, helpers.to_2tuple, registry.register_model = helpers, timm.layers.to_2tuple, lambda f: f
    sys.modules |= {module.__name__: module for module in (layers, helpers, registry)}
    sys.path.insert(0, str(folder))
    for library in (folder / "models").rglob("match_attention*.so"):
        # By its path: a script of ours has the same name.
        spec = importlib.util.spec_from_file_location("match_attention", library)
        assert spec
        assert spec.loader
        sys.modules["match_attention"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def cuda_operator_built() -> bool:
    return hasattr(sys.modules.get("match_attention"), "fused_forward")


def network(implementation: str = "pytorch") -> nn.Module:
    """Their tiny network, after `use`. `implementation` of match attention: `"pytorch"` or `"cuda"`."""
    from models.match_stereo import MatchStereo

    torch.manual_seed(0)
    return MatchStereo(Namespace(mode="stereo", variant="tiny", mat_impl=implementation, device_id=-1))
