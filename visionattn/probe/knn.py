r"""Exact nearest-neighbour classification of frozen features.

    s_ij  = x_i . t_j / (|x_i| |t_j|)                      x_i a test image's vector, t_j a training image's
    p_ic  proportional to sum over the k largest s_ij of exp(s_ij / T) [label of j is c]

Cosines are dominated by the channels of the largest magnitude, and some backbones put most of a vector's energy into a
few of them. With `standardize`, each channel is first normalised to zero mean and unit variance over the training
images.

Ties between neighbours are broken by the lower row, ties between classes by the lower index. Votes are summed in
float64. k and T are selected on held-out training images, whose neighbours are the other training images; the
neighbours of test images are all training images.

The training images are read once, batch by batch, and only the current neighbours of each test image are kept, so that
memory does not grow with their number. Under torch.distributed every process handles a share of the test images and
reads all training images. Products are computed in blocks of one shape for any number of processes, so that the results
are bit-identical.

Source: the weighted vote is that of Wu et al., arXiv 1805.01978, and of DINO, arXiv 2104.14294.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress

from visionattn.errors import DataError, InputError
from visionattn.probe.processes import rank_and_size, together
from visionattn.probe.statistics import Interval, wilson_interval
from visionattn.probe.sweep import hold_out
from visionattn.probe.tokens.interface import Features, Tokens

__all__ = ["ChannelStatistics", "Neighbours", "NeighboursResult", "channel_statistics", "nearest_neighbours"]


@dataclass(frozen=True)
class Neighbours:
    """Result for one number of neighbours and one temperature.

    Attributes:
        k: Number of neighbours.
        temperature: Temperature T.
        held_out_accuracy: Accuracy on held-out training images; NaN if none are held out.
        predictions: Predicted class of each test image, int64 (n,).
        confidences: Share of the votes for the predicted class, float64 (n,).
        correct: Whether the prediction is correct, bool (n,).
    """

    k: int
    temperature: float
    held_out_accuracy: float
    predictions: torch.Tensor
    confidences: torch.Tensor
    correct: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of the test images with a correct prediction."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self.correct))


@dataclass(frozen=True)
class NeighboursResult:
    """Every pair of k and T, and the pair with the highest held-out accuracy (ties: the first)."""

    pairs: list[Neighbours]
    chosen: Neighbours

    def rows(self) -> list[dict[str, Any]]:
        """Return the table, one row per pair."""
        return [
            {
                "k": pair.k,
                "temperature": pair.temperature,
                "chosen": pair is self.chosen,
                "held_out_accuracy": pair.held_out_accuracy,
                "test_accuracy": pair.accuracy,
                "test_accuracy_low": pair.interval.low,
                "test_accuracy_high": pair.interval.high,
            }
            for pair in self.pairs
        ]


class ChannelStatistics(NamedTuple):
    """Mean and standard deviation of each channel, float64 (D,); the deviation of a constant channel is 1."""

    mean: torch.Tensor
    deviation: torch.Tensor


def channel_statistics(
    features: Features, batch_size: int = 4096, progress: Progress | None = None
) -> dict[tuple[int, str], ChannelStatistics]:
    """Read all images once, and return the statistics of the vectors at each layer, for `nearest_neighbours`.

    Args:
        features: Training images.
        batch_size: Images per batch.
        progress: Display of the progress bar.

    Returns:
        Statistics by the index of the layer and the source, `"class"` or `"mean"`.

    Raises:
        DataError: Tokens contain NaN or infinity.
    """
    sums: dict[tuple[int, str], torch.Tensor] = {}  # (2, D): values and squares, shifted by a first estimate
    first: dict[tuple[int, str], torch.Tensor] = {}
    bar = progress.add_task("channels", total=len(features)) if progress is not None else None
    for numbers, tokens in features.batches(torch.arange(len(features)), batch_size):
        if progress is not None and bar is not None:
            progress.advance(bar, len(numbers))
        for layer, given in enumerate(tokens):
            for source in ("class", "mean") if given.class_token is not None else ("mean",):
                vectors = _pooled(given, source, numbers, torch.device("cpu")).double()
                # Without the shift, the squares of a channel with a large mean would lose its variance to rounding.
                vectors = vectors - first.setdefault((layer, source), vectors.mean(0))
                more = torch.stack([vectors.sum(0), vectors.square().sum(0)])
                sums[layer, source] = sums[layer, source] + more if (layer, source) in sums else more
    if progress is not None and bar is not None:
        progress.remove_task(bar)
    found = {}
    for key, (total, squares) in sums.items():
        shift = total / len(features)
        mean, deviation = first[key] + shift, (squares / len(features) - shift.square()).clamp_min(0).sqrt()
        varies = deviation > 1e-6 * mean.abs()  # smaller values are rounding errors of float32
        found[key] = ChannelStatistics(mean, torch.where(varies, deviation, 1.0))
    return found


def _pooled(tokens: Tokens, source: str, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The class token, or the mean of the patches, (B, D), in float32 or float64."""
    vector = tokens.class_token if source == "class" else tokens.patches
    if vector is None:
        raise InputError("The features have no class token, although their layer states one.")
    vector = vector.to(device, torch.promote_types(vector.dtype, torch.float32))
    vector = vector if source == "class" else vector.mean(dim=1)
    if not vector.isfinite().all():
        broken = rows[~vector.isfinite().all(1).cpu()].tolist()
        raise DataError(f"The tokens of {len(broken)} images contain NaN or infinity; the first is row {broken[0]}.")
    return vector


def nearest_neighbours(
    train: Features,
    test: Features,
    layer: int = -1,
    source: str = "class",
    ks: Sequence[int] = (5, 10, 15, 20, 50, 100, 200),
    temperatures: Sequence[float] = (0.07, 0.1, 0.2),
    *,
    holdout: float = 0.1,
    seed: int = 0,
    train_chunk: int = 4096,
    test_chunk: int = 512,
    device: str | torch.device = "cpu",
    process_group: dist.ProcessGroup | None = None,
    standardize: bool | ChannelStatistics = False,
    progress: Progress | None = None,
) -> NeighboursResult:
    """Classify test images by their nearest training images (see the module).

    Args:
        train: Training images.
        test: Test images.
        layer: Index of the layer among those of the features.
        source: Vector of an image: the `"class"` token, or the `"mean"` of the patches.
        ks: Numbers of neighbours; limited to the number of training images that are not held out.
        temperatures: Temperatures T of the vote.
        holdout: Share of the training images that is held out for selection; 0 with a single pair.
        seed: Seed of the held-out split.
        train_chunk: Training images per block.
        test_chunk: Test images per block.
        device: Device on which products are computed.
        process_group: Processes that divide the test images; None: the default group, if torch.distributed has been
            initialised. Every process returns the whole result.
        standardize: Normalise channels to zero mean and unit variance over the training images. True reads these once
            more; pass the result of `channel_statistics` to avoid this.
        progress: Display of the progress bar.

    Raises:
        InputError: The features or settings are not supported; the message states why.
        DataError: Tokens contain NaN or infinity.
    """
    layers = train.layers
    if layers != test.layers or train.classes != test.classes or not len(train) or not len(test):
        raise InputError("Training and test images must exist and have the same layers and classes.")
    if not -len(layers) <= layer < len(layers) or source not in ("class", "mean"):
        raise InputError(
            f"layer must be an index of {len(layers)} layers, and source one of 'class', 'mean'; got {layer} and "
            f"{source!r}."
        )
    if source == "class" and not layers[layer].has_class:
        raise InputError(f"Layer {layers[layer].name!r} has no class token: use the source 'mean'.")
    if not ks or not temperatures or min(ks) < 1 or min(temperatures) <= 0 or min(train_chunk, test_chunk) < 1:
        raise InputError("ks, temperatures and chunk sizes must be above 0, with at least one of each.")
    every = torch.arange(len(train))
    kept, held = hold_out(train.labels, every, holdout, seed)
    ks = list(dict.fromkeys(min(k, len(kept)) for k in ks))
    pairs = [(k, temperature) for k in ks for temperature in temperatures]
    if not len(held) and len(pairs) > 1:
        raise InputError("Selecting k and T requires held-out training images: set holdout above 0, or give one pair.")

    if standardize is True:
        standardize = channel_statistics(train, train_chunk)[layer % len(layers), source]
    statistics = standardize if isinstance(standardize, ChannelStatistics) else None
    search = _Search(train, layer, source, max(ks), train_chunk, torch.device(device), statistics, progress)
    queries = [(train, held, True)] if len(held) else []
    queries.append((test, torch.arange(len(test)), False))
    blocks = [(features, rows, alone) for features, all_rows, alone in queries for rows in all_rows.split(test_chunk)]
    rank, processes = rank_and_size(process_group)
    mine = range(rank, len(blocks), processes)

    def vote() -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        found = search.run([blocks[number] for number in mine], held, test_chunk)
        return {
            number: _vote(similarity, train.labels[nearest], pairs, len(train.classes))
            for number, (similarity, nearest) in zip(mine, found, strict=True)
        }

    votes = {number: vote for part in together(vote, process_group) for number, vote in part.items()}
    count = math.ceil(len(held) / test_chunk)
    in_order = [votes[number] for number in range(len(blocks))]
    predictions, confidences = (torch.cat(part, dim=1) for part in zip(*in_order[count:], strict=True))
    of_held = torch.cat([part for part, _ in in_order[:count]], dim=1) if count else None
    results = []
    for number, (k, temperature) in enumerate(pairs):
        held_out = math.nan
        if of_held is not None:
            held_out = float((of_held[number] == train.labels[held]).double().mean())
        correct = predictions[number] == test.labels
        results.append(Neighbours(k, temperature, held_out, predictions[number], confidences[number], correct))
    chosen = results[0] if of_held is None else max(results, key=lambda pair: pair.held_out_accuracy)
    return NeighboursResult(results, chosen)


class _Search:
    """Search for the k nearest training images of blocks of images."""

    def __init__(
        self,
        train: Features,
        layer: int,
        source: str,
        k: int,
        chunk: int,
        device: torch.device,
        statistics: ChannelStatistics | None,
        progress: Progress | None,
    ) -> None:
        self.train, self.layer, self.source, self.k = train, layer, source, k
        self.chunk, self.device, self.progress = chunk, device, progress
        self.statistics = statistics

    def run(
        self, blocks: list[tuple[Features, torch.Tensor, bool]], held: torch.Tensor, size: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Search for blocks of images and their rows, excluding held-out training images where requested.

        Returns:
            Per block, similarities (b, k) in decreasing order, and rows of training images (b, k), int64, on the CPU.
        """
        queries = [self._vectors(features, rows, size) for features, rows, _ in blocks]
        absent = torch.zeros(len(self.train), dtype=torch.bool)
        absent[held] = True
        best: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(blocks)
        bar = self.progress.add_task("neighbours", total=len(self.train)) if self.progress is not None else None
        for rows in torch.arange(len(self.train)).split(self.chunk):
            vectors = self._vectors(self.train, rows, self.chunk)
            for number, (_, _, alone) in enumerate(blocks):
                similarity = (queries[number] @ vectors.T)[:, : len(rows)]
                if alone:
                    similarity.masked_fill_(absent[rows].to(self.device), -math.inf)
                places = rows.to(self.device).expand(len(similarity), -1)
                before = best[number]
                if before is not None:
                    similarity = torch.cat([before[0], similarity], dim=1)
                    places = torch.cat([before[1], places], dim=1)
                best[number] = _largest(similarity, places, self.k)
            if self.progress is not None and bar is not None:
                self.progress.advance(bar, len(rows))
        if self.progress is not None and bar is not None:
            self.progress.remove_task(bar)
        found = []
        for (_, rows, _), result in zip(blocks, best, strict=True):
            if result is not None:
                found.append((result[0][: len(rows)].cpu(), result[1][: len(rows)].cpu()))
        return found

    def _vectors(self, features: Features, rows: torch.Tensor, size: int) -> torch.Tensor:
        """Unit vectors (size, D) of up to `size` images, padded with zeros so that all products have one shape."""
        parts = []
        for numbers, tokens in features.batches(rows, size):
            vector = _pooled(tokens[self.layer], self.source, numbers, self.device)
            if self.statistics is not None:
                mean, deviation = (part.to(vector) for part in self.statistics)
                vector = (vector - mean) / deviation
            parts.append(F.normalize(vector, dim=1))
        vectors = torch.cat(parts)
        return F.pad(vectors, (0, 0, 0, size - len(vectors)))


def _largest(similarity: torch.Tensor, places: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row in decreasing order, and their positions; ties: the lower position first."""
    k = min(k, similarity.shape[1])
    values, indices = similarity.topk(k, dim=1)
    # topk chooses arbitrarily among values equal to the last one; if there are more of them than fit, sort.
    several = ((similarity >= values[:, -1:]).sum(1) > k).nonzero().squeeze(1)
    if len(several):
        ordered = similarity[several].sort(dim=1, descending=True, stable=True).indices[:, :k]
        indices[several] = ordered
    indices = indices.sort(dim=1).values
    values, order = similarity.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, indices.gather(1, order))


def _vote(
    similarity: torch.Tensor, labels: torch.Tensor, pairs: list[tuple[int, float]], classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted classes, and their share of the vote, for each pair of k and T: (b, k) -> (pairs, b)."""
    similarity = similarity.double()
    numbers = torch.arange(classes)
    predictions, confidences = [], []
    for k, temperature in pairs:
        # Subtracting the largest avoids overflow for a small T.
        weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(weights), classes).scatter_add_(1, labels[:, :k], weights)
        most = votes.amax(1, keepdim=True)
        predictions.append(torch.where(votes == most, numbers, classes).amin(1))
        confidences.append(most.squeeze(1) / votes.sum(1))
    return torch.stack(predictions), torch.stack(confidences)
