"""Interchangeable token mixers of a transformer layer: one contract, one mechanism per file.

`MIXERS` maps names to classes. The contract and the shared code are in `visionattn.mixers.core`.
"""

import difflib

from visionattn.errors import UnknownNameError, shorten
from visionattn.mixers.adapters import CollapsedMixer, GateMixer, HaloMixer, SymmetricMixer, TiedMixer
from visionattn.mixers.agent import AgentMixer
from visionattn.mixers.controls import IdentityMixer, MeanMixer, Pool3x3Mixer, SoftmaxConvMixer, SoftmaxMixer
from visionattn.mixers.core import FEATURES, Mixer
from visionattn.mixers.deconstruct import (
    FixedQKMixer,
    KeyOnlyMixer,
    MlpMixer,
    RandomQKMixer,
    StaticQKMixer,
    TaylorMixer,
)
from visionattn.mixers.dma import DynamicMaskMixer
from visionattn.mixers.hsa import HierarchicalMixer
from visionattn.mixers.local_linear import LocalLinearMixer, ParallaxMixer
from visionattn.mixers.moh import GatedHeadsMixer, MixtureOfHeadsMixer
from visionattn.mixers.reread import RereadMixer
from visionattn.mixers.silu_cross import SiluCrossMixer
from visionattn.mixers.softplus import ReweightedSoftplusMixer, SoftplusMixer
from visionattn.mixers.window import WindowMixer

MIXERS: dict[str, type[Mixer]] = {
    "softmax": SoftmaxMixer,
    "identity": IdentityMixer,
    "mean": MeanMixer,
    "pool3x3": Pool3x3Mixer,
    "softmax_conv": SoftmaxConvMixer,
    "window": WindowMixer,
    "hsa": HierarchicalMixer,
    "dma": DynamicMaskMixer,
    "lssa": SoftplusMixer,
    "lssar": ReweightedSoftplusMixer,
    "parallax": ParallaxMixer,
    "local_linear": LocalLinearMixer,
    "agent": AgentMixer,
    "moh": MixtureOfHeadsMixer,
    "gated_heads": GatedHeadsMixer,
    "mlp": MlpMixer,
    "taylor": TaylorMixer,
    "key_only": KeyOnlyMixer,
    "random_qk": RandomQKMixer,
    "fixed_qk": FixedQKMixer,
    "static_qk": StaticQKMixer,
    "silu_cross": SiluCrossMixer,
    "reread": RereadMixer,
    "halo": HaloMixer,
    "tied": TiedMixer,
    "collapsed": CollapsedMixer,
    "symmetric": SymmetricMixer,
    "gate": GateMixer,
}


def find_mixer(name: str) -> type[Mixer]:
    """Return the mixer class of that name.

    Raises:
        UnknownNameError: There is no mixer of that name.
    """
    if name not in MIXERS:
        close = difflib.get_close_matches(name, MIXERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(MIXERS)}."
        raise UnknownNameError(f"There is no mixer {shorten(name)!r}: {hint}")
    return MIXERS[name]


__all__ = ["FEATURES", "MIXERS", "Mixer", "find_mixer", *sorted(mixer.__name__ for mixer in MIXERS.values())]
