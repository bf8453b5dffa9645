"""A frozen model under a selection policy: `with using(model, policy): model(images)`, and its export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visionattn.errors import InputError, shorten
from visionattn.export.api import export as export_model
from visionattn.frozen.calls import Call, Reached, replacing
from visionattn.frozen.plan import Plan
from visionattn.frozen.policies import Index
from visionattn.frozen.tiles import near_far_attention

__all__ = ["UnderPolicy", "attend", "export", "using"]

Selection = Callable[..., Index | None]


def attend(policy: Selection, call: Call) -> Tensor | None:
    """Attention of a call under a policy; None if it stays dense, for example without a grid or with a bias.

    Tile sizes and tail are attributes of the policy; for a plain function they are 8 and 4, with the tail.
    """
    if hasattr(policy, "attend"):
        return policy.attend(call)
    if call.grid is None or call.bias is not None:
        return None
    q, prefix = call.q * call.scale, call.prefix
    index = policy(q[:, :, prefix:], call.k[:, :, prefix:], call.grid, call.number, call.state)
    if index is None:
        return None
    if not isinstance(index, (Tensor, list, tuple)):
        raise InputError(
            f"A policy must return indices of key tiles, a list of them, or None; got {shorten(repr(index))}."
        )
    return near_far_attention(
        q,
        call.k,
        call.v,
        call.grid,
        index,
        query_tile=getattr(policy, "query_tile", 8),
        key_tile=getattr(policy, "key_tile", 4),
        tail=getattr(policy, "tail", True),
        prefix=prefix,
    )


@contextmanager
def using(
    model: nn.Module, policy: Selection | Plan | str | Path, layers: str | Sequence[str] = "*"
) -> Iterator[Reached]:
    """Run a frozen model with sparse attention.

        with visionattn.frozen.using(model, Window(budget=0.25)) as reached, torch.no_grad():
            features = model.forward_features(images)
        print(reached)                                  # "12 layers reached"

    Args:
        model: Any model in evaluation mode that calls `scaled_dot_product_attention` (see `visionattn.frozen.calls`).
            It is not changed, and its attention is dense again after the context.
        policy: A policy (see `visionattn.frozen.policies`), a plan, or the path of a plan file.
        layers: Pattern of layer names, or several, such as `"blocks.1?.attn"`; the others stay dense, and so do layers
            to which `prune_tokens` gives only a part of the grid.

    Yields:
        Which layers were reached, which stayed dense and why, and which do not call the function.

    Raises:
        InputError: The plan belongs to another model, a call requires gradients, or, at the end, no layer was reached.
        DataError: The file is not a plan.
    """
    policy = _policy(model, policy)
    with replacing(model, lambda call: attend(policy, call), layers) as reached:
        yield reached


def _policy(model: nn.Module, policy: Any) -> Selection:
    if isinstance(policy, (str, Path)):
        policy = Plan.load(policy)
    if isinstance(policy, Plan):
        policy.check(model)
        return policy.make()
    if not callable(policy):
        raise InputError(f"policy must be a policy, a plan or the path of a plan; got {shorten(repr(policy))}.")
    return policy


class UnderPolicy(nn.Module):
    """A module that always runs a model under a policy, for export and for counting costs.

    Args:
        model: See `using`.
        policy: See `using`.
        layers: See `using`.

    Raises:
        InputError: The plan belongs to another model.
        DataError: The file is not a plan.
    """

    def __init__(
        self, model: nn.Module, policy: Selection | Plan | str | Path, layers: str | Sequence[str] = "*"
    ) -> None:
        super().__init__()
        self.policy, self.layers = _policy(model, policy), layers
        self.model = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Any:
        """Output of the model."""
        with using(self.model, self.policy, self.layers):
            return self.model(images)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model, such as its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def export(
    model: nn.Module,
    output: str | Path,
    policy: Selection | Plan | str | Path,
    layers: str | Sequence[str] = "*",
    **settings: Any,
) -> tuple[Any, ...]:
    """Write a model under a policy as ONNX and check the file against PyTorch.

    The file has a fixed image size, since the number of tiles is part of the graph; the batch size is dynamic.

    Args:
        model: See `using`.
        output: File to write.
        policy: See `using`.
        layers: See `using`.
        **settings: Arguments of `visionattn.export`, such as `image_size=512`.

    Returns:
        What `visionattn.export` returns.

    Raises:
        InputError: See `using`, or the model does not accept the size.
        DataError: The file is not a plan.
        ExportError: The model cannot be exported, or the outputs of the file differ.
        StorageError: The output exists or could not be written.
    """
    return export_model(UnderPolicy(model, policy, layers), output, static_size=True, **settings)
