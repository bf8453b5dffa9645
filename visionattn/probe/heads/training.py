"""Training of heads: optimizers, epochs, best weights and state file (protocol: see `visionattn.probe.sweep`)."""

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from timm.optim import Lars

from visionattn.errors import DataError, InputError, shorten
from visionattn.files import write_state
from visionattn.probe.heads.banks import Head, HeadSpec, bank_tokens, create_head, group_logits, make_banks
from visionattn.probe.heads.objectives import Classification, Objective
from visionattn.probe.heads.results import HeadResult
from visionattn.probe.saved import read_state
from visionattn.probe.tokens.interface import Features, Tokens

__all__ = ["HeadTraining"]

KEPT = ("epoch", "seconds", "held_out", "best_epoch", "best", "diverged")  # stored in the state file unchanged


def _refuse_broken(features: Features, tokens: list[Tokens], rows: torch.Tensor) -> None:
    """Check that tokens are finite."""
    for layer, given in zip(features.layers, tokens, strict=True):
        for part in given:
            if part is not None and not part.isfinite().all():
                broken = rows[~part.flatten(1).isfinite().all(1).cpu()].tolist()
                raise DataError(
                    f"The tokens of layer {layer.name!r} contain NaN or infinity in {len(broken)} images of a batch, "
                    f"the first of them row {broken[0]}: extract them again with a wider data type."
                )


class HeadTraining:
    """Training of heads on some rows, and their test.

    Args:
        train: Training images.
        test: Test images.
        specs: Settings of the heads, with layers counted from 0.
        fit_rows: Training images used for training.
        held_rows: Training images used to select the epoch of each head; if empty, the last epoch is used.
        epochs: Passes over the images of `fit_rows`.
        batch_size: Images per step.
        warmup_epochs: Epochs in which the learning rate rises from 0.
        seed: Seed of the order of images.
        device: Device on which heads are trained.
        state: File that is written after each epoch, and from which training resumes.
        progress: Display of the progress bar.
        objective: Objective of the heads; None: classification.

    Raises:
        InputError: A batch has fewer than 2 images, or more than there are for training.
    """

    def __init__(
        self,
        train: Features,
        test: Features,
        specs: list[HeadSpec],
        fit_rows: torch.Tensor,
        held_rows: torch.Tensor,
        *,
        epochs: int,
        batch_size: int,
        warmup_epochs: float,
        seed: int,
        device: torch.device,
        state: Path | None,
        progress: Progress | None,
        objective: Objective | None = None,
    ) -> None:
        self.objective = objective or Classification()
        if not 2 <= batch_size <= len(fit_rows):
            raise InputError(
                f"batch_size must be from 2 to {len(fit_rows)}, the number of images to train on; got {batch_size}."
            )
        self.train, self.test, self.specs = train, test, specs
        self.fit_rows, self.held_rows = fit_rows, held_rows
        self.epochs, self.batch_size, self.warmup_epochs, self.seed = epochs, batch_size, warmup_epochs, seed
        self.device, self.state, self.progress = device, state, progress
        self.steps = len(fit_rows) // batch_size  # per epoch
        first = next(train.batches(fit_rows[:1], 1))[1]
        self.dtype = torch.float64 if first[0].patches.dtype == torch.float64 else torch.float32
        self.heads = [
            create_head(spec, train.layers[spec.layer], len(train.classes)).to(device, self.dtype) for spec in specs
        ]
        self.groups = make_banks(self.heads, specs, batch_size)
        self.banks = [bank for _, banks, _ in self.groups for bank in banks]
        self.order = torch.tensor([number for _, _, numbers in self.groups for number in numbers])
        self.optimizers = self._optimizers()
        self.epoch, self.seconds = 0, 0.0
        self.held_out: list[list[float]] = [[] for _ in specs]
        self.best_epoch = [0] * len(specs)
        self.best = [self._weights(head) for head in self.heads]
        self.diverged = [0] * len(specs)

    def results(self) -> list[HeadResult]:
        """Train, resuming from the state file, then test."""
        self._resume()
        bar: Any = None
        if self.progress is not None:
            bar = self.progress.add_task("heads", total=self.epochs * self.steps, completed=self.epoch * self.steps)
        while self.epoch < self.epochs:
            start = time.perf_counter()
            finite = self._train_epoch(bar)
            self.epoch += 1
            self._after_epoch(finite)
            self.seconds += time.perf_counter() - start
            self._save()
        if self.progress is not None:
            self.progress.remove_task(bar)
        last = self._scores()
        for _, banks, numbers in self.groups:
            weights = iter(numbers)
            for bank in banks:
                bank.load([self.best[next(weights)] for _ in bank.heads])
        best = last if all(epoch == self.epochs for epoch in self.best_epoch) else self._scores()
        results = []
        for number, spec in enumerate(self.specs):
            layer = self.train.layers[spec.layer]
            head = create_head(spec, layer, len(self.train.classes)).to(self.dtype)
            head.load_state_dict(self.best[number])
            results.append(
                HeadResult(
                    spec=spec,
                    layer=layer.name,
                    head=head.eval(),
                    held_out=self.held_out[number],
                    best_epoch=self.best_epoch[number],
                    last=None if self.diverged[number] else last[number],
                    best=best[number] if self.best_epoch[number] else None,
                    diverged=self.diverged[number],
                )
            )
        return results

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer of each kind, with parameters grouped by their settings, and the peak learning rates."""
        groups: dict[tuple, list[torch.nn.Parameter]] = {}
        for spec, head in zip(self.specs, self.heads, strict=True):
            for parameter in head.parameters():
                matrix = parameter.ndim > 1
                key = (spec.optimizer, spec.lr, spec.weight_decay if matrix else 0.0, matrix)
                groups.setdefault(key, []).append(parameter)
        by_kind: dict[str, list[dict]] = {}
        for (kind, lr, decay, matrix), parameters in groups.items():
            group = {"params": parameters, "weight_decay": decay, "peak": lr}
            if kind == "lars":
                group |= {"peak": lr * self.batch_size / 256, "always_adapt": matrix}
            by_kind.setdefault(kind, []).append(group)
        return [
            Lars(groups, momentum=0.9, trust_coeff=0.001, foreach=True)
            if kind == "lars"
            else torch.optim.AdamW(groups, foreach=True)
            for kind, groups in by_kind.items()
        ]

    def _train_epoch(self, bar: Any) -> torch.Tensor:
        """Train for an epoch; return whether the loss of each head stayed finite, (heads,) in the banks' order."""
        for bank in self.banks:
            bank.train(True)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.fit_rows))
        rows = self.fit_rows[torch.from_numpy(order)][: self.steps * self.batch_size]
        finite = torch.ones(len(self.heads), dtype=torch.bool, device=self.device)
        for step, (labels, groups) in enumerate(self._batches(self.train, rows)):
            done = self.epoch + step / self.steps
            if done < self.warmup_epochs:
                factor = done / self.warmup_epochs
            else:
                share = (done - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-12)
                factor = 0.5 * (1 + math.cos(math.pi * share))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
            for bank in self.banks:
                bank.zero_grad()
            losses = []
            for (_, banks, _), tokens in zip(self.groups, groups, strict=True):
                own = [self.objective.losses(logits, labels).mean(1) for logits in group_logits(banks, *tokens)]
                torch.cat(own).sum().backward()
                losses += [loss.detach() for loss in own]
            finite &= torch.cat(losses).isfinite()
            for optimizer in self.optimizers:
                optimizer.step()
            if self.progress is not None:
                self.progress.advance(bar)
        return finite.cpu()

    def _after_epoch(self, finite: torch.Tensor) -> None:
        """Record the results of the epoch: divergence, held-out accuracies, the best weights."""
        diverging = [int(n) for n, fine in zip(self.order, finite, strict=True) if not fine and not self.diverged[n]]
        if diverging:
            for rows, tokens in self.train.batches(self.fit_rows, self.batch_size):
                _refuse_broken(self.train, tokens, rows)
        for number in diverging:
            self.diverged[number] = self.epoch
        accuracies = [math.nan] * len(self.heads)
        if len(self.held_rows):
            accuracies = self.objective.held_out(self._logits(self.train, self.held_rows))
        for number, head in enumerate(self.heads):
            if self.diverged[number]:
                continue
            before = self.held_out[number]
            if not len(self.held_rows) or accuracies[number] > max(before, default=-math.inf):
                self.best_epoch[number], self.best[number] = self.epoch, self._weights(head)
            if len(self.held_rows):
                before.append(accuracies[number])

    def _scores(self) -> list[Any]:
        """Test the heads with their current weights."""
        return self.objective.scores(self._logits(self.test, torch.arange(len(self.test))))

    @torch.no_grad()
    def _logits(self, features: Features, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Labels (B,) and logits (heads, B, K) of each batch, in evaluation mode, with heads in the requested order."""
        for bank in self.banks:
            bank.train(False)
        place = self.order.argsort().to(self.device)
        sound = torch.tensor([not epoch for epoch in self.diverged], device=self.device)
        for (labels, groups), numbers in zip(self._batches(features, rows), rows.split(self.batch_size), strict=True):
            found = [
                logits
                for (_, banks, _), tokens in zip(self.groups, groups, strict=True)
                for logits in group_logits(banks, *tokens)
            ]
            logits = torch.cat(found)[place]
            if not logits[sound].isfinite().all():
                for broken, tokens in features.batches(numbers, self.batch_size):
                    _refuse_broken(features, tokens, broken)
            yield labels, logits

    def _batches(self, features: Features, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[tuple]]]:
        """Labels, and the tokens and scales that each group of banks reads, batch by batch."""
        first = [(layer, banks[0]) for layer, banks, _ in self.groups]
        for numbers, tokens, scales in features.stored_batches(rows, self.batch_size):
            keys = [(layer, bank.kind, scales is not None and not bank.takes_int8) for layer, bank in first]
            read: dict[tuple[int, str, bool], tuple] = {}
            for key, (layer, bank) in zip(keys, first, strict=True):
                if key not in read:
                    by = None if scales is None else scales[layer]
                    read[key] = bank_tokens(bank, tokens[layer], by, self.device, self.dtype)
            yield features.labels[numbers].to(self.device), [read[key] for key in keys]

    def _weights(self, head: Head) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}

    def _identity(self) -> str:
        """Hash of all that must be equal for a state file to belong to this run."""
        settings = [
            self.specs, self.train.layers, self.train.classes, len(self.train), self.epochs, self.batch_size,
            self.warmup_epochs, self.seed, str(self.dtype),
        ]  # fmt: skip
        digest = hashlib.sha256(repr(settings).encode())
        for rows in (self.fit_rows, self.held_rows):
            digest.update(rows.numpy().tobytes() + self.train.labels[rows].numpy().tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.state is None:
            return
        content = {
            "identity": self._identity(),
            "heads": [self._weights(head) for head in self.heads],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **{name: getattr(self, name) for name in KEPT},
        }
        write_state(self.state, content)

    def _resume(self) -> None:
        if self.state is None or not self.state.exists():
            return
        try:
            content = read_state(self.state)
            if content["identity"] != self._identity():
                raise InputError("belongs to another sweep")
            self._take(content)
        except InputError as error:
            raise DataError(
                f"{shorten(self.state)} belongs to a sweep over other images, heads or settings: delete it to start "
                "again, or choose another file."
            ) from error
        except Exception as error:
            # A file that is not a state can lack any entry, or have entries of any type or shape.
            raise DataError(
                f"{shorten(self.state)} is not a state of a sweep: {shorten(error)} Delete it to start again."
            ) from error

    def _take(self, content: dict[str, Any]) -> None:
        """Resume from saved content."""
        count = len(self.specs)
        lists = all(len(content[name]) == count for name in ("held_out", "best_epoch", "best", "diverged"))
        if not lists or not 0 <= content["epoch"] <= self.epochs or not content["seconds"] >= 0:
            raise DataError("It has a different number of heads or epochs.")
        for head, weights in zip(self.heads, content["heads"], strict=True):
            head.load_state_dict(weights)
        for optimizer, kept in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        for name in KEPT:
            setattr(self, name, content[name])
