"""Models, one family per file. Importing this package registers every name in timm's registry."""

from __future__ import annotations

import difflib

import timm
from torch import nn

from visionattn.errors import InputError, shorten
from visionattn.models import cca as _cca  # noqa: F401
from visionattn.models import dcal as _dcal  # noqa: F401
from visionattn.models import halonet as _halonet  # noqa: F401
from visionattn.models import match_stereo as _match_stereo  # noqa: F401
from visionattn.models import minimal_vit as _minimal_vit  # noqa: F401
from visionattn.models import mixer_vit as _mixer_vit  # noqa: F401
from visionattn.models import mobilenet_ulsam as _mobilenet_ulsam  # noqa: F401
from visionattn.models import span as _span  # noqa: F401
from visionattn.models import span_challenge as _span_challenge  # noqa: F401

__all__ = ["check_task", "names", "suggest"]


def names() -> list[str]:
    """List the model names of this package, sorted."""
    return timm.list_models("va_*")


def suggest(name: str, count: int = 3) -> list[str]:
    """List the names in timm's registry, including ours, that are most similar to `name`."""
    return difflib.get_close_matches(name, timm.list_models(), n=count, cutoff=0.5)


def check_task(model: nn.Module, task: str | tuple[str | None, ...] | None, name: str | None = None) -> None:
    """Check that a model is of an accepted task.

    Args:
        model: The model; its attribute `task` is compared.
        task: Accepted task or tasks; None accepts all.
        name: Name of the model in the error message. Default: its class.

    Raises:
        InputError: The model is of another task, or states none.
    """
    accepted = (task,) if isinstance(task, str) else task
    own = getattr(model, "task", None)
    if accepted is None or own in accepted:
        return
    does = f"it is a {own!r} model" if own else "it states no task"
    wanted = " or ".join(repr(one) for one in accepted if one)
    raise InputError(
        f"{shorten(name or type(model).__name__)} cannot be used here: {does}; a {wanted} model is required. "
        "`visionattn list` shows them."
    )
