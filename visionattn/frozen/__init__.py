"""Frozen backbones: inspect their attention and replace it, without training."""

from visionattn.frozen.calls import Call, Reached, observing, replacing
from visionattn.frozen.plan import Plan, make_plan
from visionattn.frozen.policies import POLICIES, Policy
from visionattn.frozen.selection import best_plan, measure_policies
from visionattn.frozen.using import UnderPolicy, export, using

__all__ = [
    "POLICIES",
    "Call",
    "Plan",
    "Policy",
    "Reached",
    "UnderPolicy",
    "best_plan",
    "export",
    "make_plan",
    "measure_policies",
    "observing",
    "replacing",
    "using",
]
