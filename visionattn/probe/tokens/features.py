"""Tokens of a data set: extracted once to memory-mapped files, or computed at each pass.

`visionattn.probe.tokens.shards` says how the files of a store look.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from visionattn.errors import ConfigError, DataError, StorageError, shorten
from visionattn.files import check_folder
from visionattn.probe.processes import one_writer, rank_and_size, together
from visionattn.probe.tokens.backbone import Backbone
from visionattn.probe.tokens.interface import Features, Layer, Tokens, dequantize
from visionattn.probe.tokens.live import LiveFeatures, split_rows
from visionattn.probe.tokens.loading import ImageBatch, check_share, read_batches
from visionattn.probe.tokens.shards import (
    FORMAT,
    Encoded,
    ShardPart,
    ShardWriter,
    encode,
    open_shard,
    read_meta,
    shard_parts,
    summary_file,
    write_json,
)
from visionattn.weights.hashing import hash_state

__all__ = ["LiveFeatures", "StoredFeatures", "estimate", "extract", "space_line"]

_NAMED = ("model", "transform", "dataset")
# Batches that the backbone may be ahead of the disk; each is held in memory.
_AHEAD = 2


def estimate(backbone: Backbone, images: int, precision: str) -> int:
    """Size of the tokens of `images` images on disk, in bytes. The model may lie on the meta device."""
    return sum(part.bytes(images) for part in shard_parts(backbone.layers, precision))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def _free(folder: Path) -> int:
    """Bytes that may still be written to a folder that need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def space_line(backbone: Backbone, images: int, precision: str, folder: str | Path) -> str:
    """One line to be printed before an extraction: what it will take of the disk, and what is free there."""
    layers = ", ".join(f"{layer.name} {layer.grid[0]}x{layer.grid[1]}x{layer.dim}" for layer in backbone.layers)
    size, free = estimate(backbone, images, precision), _free(Path(folder))
    return f"Tokens of {images:,} images ({layers}) in {precision}: {_gigabytes(size)}; free: {_gigabytes(free)}."


def extract(
    backbone: Backbone,
    dataset: Any,
    folder: str | Path,
    *,
    identity: Mapping[str, Any],
    classes: Sequence[str],
    precision: str = "fp16",
    batch_size: int = 64,
    num_workers: int = 0,
    shard_images: int = 1024,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> StoredFeatures:
    """Store the tokens of a data set, or open them where they are stored already.

    A run that ended early goes on: finished shards are checked and kept, and with the same arguments on the same
    machine the files come out byte for byte as without the interruption. Damaged shards are computed again, with a
    warning. Images that cannot be read are left out and listed in `meta.json`. While a run writes to a store, another
    one that would is refused. Under torch.distributed all processes call this, and each computes a part of the shards.

    Args:
        backbone: Gives the tokens.
        dataset: Map-style data set of (normalised float image (C, H, W), int label), always in the same order and
            without random augmentation.
        folder: Holds the stores, each in a folder of its own.
        identity: What the numbers depend on and the backbone does not know: `model` (its name), `transform` (its text)
            and `dataset` (which images, such as path and part), plain values.
        classes: Names of the classes.
        precision: `"fp16"`, `"bf16"`, `"fp32"`, or `"int8"` with a scale a token: half the space of fp16, each number
            off by at most 1 % of its token's largest magnitude (tokens wholly below 0.004 lose more).
        batch_size: Images that the backbone takes at once.
        num_workers: Loading processes.
        shard_images: Images a shard; a store that was begun keeps its own.
        names: What messages call the images; their rows if None.
        progress: Display in which a bar of images is shown.

    Raises:
        ConfigError: There is no such precision, or `identity` lacks an entry.
        InputError: The images do not have the backbone's size.
        DataError: The data set is empty, a label has no class, too many images cannot be read (more than 10 % and more
            than a handful), or tokens are NaN, infinite or beyond the precision.
        StorageError: The disk has no room for the tokens, or cannot be written, or another run is writing there.
    """
    parts = shard_parts(backbone.layers, precision)
    if missing := [key for key in _NAMED if key not in identity]:
        raise ConfigError(f"The identity of a feature store must name {', '.join(_NAMED)}; it lacks {missing}.")
    images = len(dataset)
    if images == 0:
        raise DataError("The data set has no images.")
    known = {
        **identity,
        "weights": hash_state(backbone.model.state_dict()),
        "layers": backbone.indices,
        "norm": backbone.norm,
        "resolution": list(backbone.image_size),
        "computed_in": str(backbone.autocast or backbone.dtype).removeprefix("torch."),
        "images": images,
        "precision": precision,
        "format": FORMAT,
    }
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    store = Path(folder) / key[:16]
    check_folder(store)
    meta = {
        "identity": known,
        "classes": list(classes),
        "shard_images": shard_images,
        "layers": [asdict(layer) for layer in backbone.layers],
        "complete": False,
    }
    finished = _find_store(store, meta)
    if all(together(lambda: finished)):
        found = [entry for part in together(lambda: _look(store, parts, meta)) for entry in part.values()]
        if all(found):
            return StoredFeatures(store, verify=False)
    with one_writer(store):
        _find_store(store, meta)
        _fill(backbone, dataset, store, parts, meta, batch_size, num_workers, names, progress)
    return StoredFeatures(store, verify=False)


def _find_store(store: Path, meta: dict[str, Any]) -> bool:
    """Take the size of shards from a store that was begun, and say whether it was finished.

    What `meta.json` says of the images must be what they are; if it does not, every shard is extracted again.
    """
    if not (store / "meta.json").exists():
        return False
    try:
        found = read_meta(store)
    except DataError as error:
        warnings.warn(f"{error} The shards that fit are kept.", stacklevel=3)
        return False
    if found["identity"] != _plain(meta["identity"]):
        raise DataError(f"{shorten(store)} holds the tokens of other images or of another backbone: delete it.")
    meta["shard_images"] = found["shard_images"]
    return found["complete"] and found["classes"] == meta["classes"] and found["layers"] == _plain(meta["layers"])


def _plain(value: Any) -> Any:
    """What JSON makes of a value: lists of tuples."""
    return json.loads(json.dumps(value))


def _spans(meta: Mapping[str, Any]) -> dict[int, range]:
    """Rows of each shard."""
    images, size = meta["identity"]["images"], meta["shard_images"]
    return {number: range(first, min(first + size, images)) for number, first in enumerate(range(0, images, size))}


def _look(store: Path, parts: Sequence[ShardPart], meta: Mapping[str, Any]) -> dict[int, dict[str, Any] | None]:
    """What the summaries of this process's shards say after their files were checked; None for what is to be done."""
    process, processes = rank_and_size()
    found = {}
    for shard, rows in _spans(meta).items():
        if shard % processes != process:
            continue
        try:
            found[shard] = open_shard(store, shard, parts, rows, len(meta["classes"]), verify=True)
        except DataError as error:
            warnings.warn(f"{error} Shard {shard} is extracted again.", stacklevel=4)
            found[shard] = None
    return found


def _fill(
    backbone: Backbone,
    dataset: Any,
    store: Path,
    parts: Sequence[ShardPart],
    meta: dict[str, Any],
    batch_size: int,
    num_workers: int,
    names: Sequence[str] | None,
    progress: Progress | None,
) -> None:
    """Extract what a store lacks."""
    found = _look(store, parts, meta)
    spans = _spans(meta)
    rows = {shard: spans[shard] for shard, content in found.items() if content is None}
    skipped = [entry for content in found.values() if content for entry in content["skipped"]]
    needed = sum(together(lambda: estimate(backbone, sum(map(len, rows.values())), meta["identity"]["precision"])))
    free = _free(store)
    if needed > free:
        raise StorageError(
            f"The tokens would take {_gigabytes(needed)}, and {shorten(store.parent)} has {_gigabytes(free)} free. "
            "Compute them at each pass (LiveFeatures), or store them in int8 at half the size of fp16."
        )

    def describe() -> None:
        if rank_and_size()[0] == 0:
            write_json(store / "meta.json", meta, indent=2)

    def write() -> list[tuple[int, str]]:
        for shard in rows:
            # What a damaged shard left must not stand as finished while it is overwritten.
            summary_file(store, shard).unlink(missing_ok=True)
        if rows:
            _write_shards(
                backbone,
                dataset,
                store,
                parts,
                rows,
                skipped,
                batch_size,
                num_workers,
                len(meta["classes"]),
                names,
                progress,
            )
        return skipped

    if needed:
        together(describe)
    skipped = sorted(entry for part in together(write) for entry in part)
    meta |= {"complete": True, "readable": meta["identity"]["images"] - len(skipped), "skipped": skipped}
    together(describe)


def _write_shards(
    backbone: Backbone,
    dataset: Any,
    store: Path,
    parts: Sequence[ShardPart],
    rows: Mapping[int, range],
    skipped: list[tuple[int, str]],
    batch_size: int,
    num_workers: int,
    num_classes: int,
    names: Sequence[str] | None,
    progress: Progress | None,
) -> None:
    """Extract shards, given the rows of each, and add to `skipped` the images that cannot be read."""
    cuts = {
        shard: [list(all[i : i + batch_size]) for i in range(0, len(all), batch_size)] for shard, all in rows.items()
    }
    loaded = read_batches(dataset, backbone.image_size, [cut for some in cuts.values() for cut in some], num_workers)
    bar = progress.add_task("tokens", total=sum(map(len, rows.values()))) if progress else None
    # Checking and writing a batch overlaps with computing the next.
    with ThreadPoolExecutor(1) as writer:
        for number, shard_cuts in cuts.items():
            with ShardWriter(store, number, backbone.layers, parts, names) as shard:
                pending: deque[Future] = deque()
                try:
                    for _ in shard_cuts:
                        batch = next(loaded)
                        skipped += batch.skipped
                        check_share(skipped, len(dataset))
                        if wrong := [label for label in batch.labels if not 0 <= label < num_classes]:
                            raise DataError(f"The data set has the label {wrong[0]}; there are {num_classes} classes.")
                        shard.labels += batch.labels
                        shard.skipped += batch.skipped
                        if batch.images is not None:
                            pending.append(
                                writer.submit(shard.write, batch.rows, *_compute(backbone, batch, parts[0].dtype))
                            )
                        if len(pending) > _AHEAD:
                            pending.popleft().result()
                        if progress and bar is not None:
                            progress.advance(bar, len(batch.rows) + len(batch.skipped))
                    while pending:
                        pending.popleft().result()
                finally:
                    wait(pending)  # nothing may write to files that are being closed
                shard.finish()


def _compute(
    backbone: Backbone, batch: ImageBatch, dtype: torch.dtype
) -> tuple[list[Encoded], torch.cuda.Event | None]:
    """Tokens of a batch in main memory, on a GPU once the event has passed."""
    assert batch.images is not None
    encoded = [encode(part, dtype) for tokens in backbone(batch.images) for part in tokens if part is not None]
    if backbone.device.type != "cuda":
        return encoded, None
    moved = [
        Encoded(
            [tensor.to("cpu", non_blocking=True) for tensor in one.tensors], one.misfits.to("cpu", non_blocking=True)
        )
        for one in encoded
    ]
    ready = torch.cuda.Event()
    ready.record()
    return moved, ready


class StoredFeatures(Features):
    """Tokens that `extract` stored, read through memory maps and given as float32 on the CPU.

    Row i of `labels` is the i-th readable image of the data set.

    Args:
        folder: The folder of the store, the one with `meta.json`.
        verify: Compare the checksum of every file, which reads them all once; without it, sizes only.

    Attributes:
        folder: As given.
        meta: What `meta.json` says.
        skipped: Place in the data set of each image that could not be read, and what was wrong with it.

    Raises:
        DataError: The folder is not a store, the extraction did not finish, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        again = "Call extract again with the same arguments: it computes what is missing."
        if not self.meta["complete"]:
            raise DataError(f"The extraction to {folder} did not finish. {again}")
        self.layers = tuple(Layer(**{**layer, "grid": tuple(layer["grid"])}) for layer in self.meta["layers"])
        self.classes = tuple(self.meta["classes"])
        self.skipped = self.meta["skipped"]
        self._parts = shard_parts(self.layers, self.meta["identity"]["precision"])
        labels: list[int] = []
        self._starts = [0]
        for shard, rows in _spans(self.meta).items():
            try:
                content = open_shard(self.folder, shard, self._parts, rows, len(self.classes), verify)
            except DataError as error:
                raise DataError(f"{error} {again}") from error
            if content is None:
                raise DataError(f"{folder} lacks shard {shard}. {again}")
            labels += content["labels"]
            self._starts.append(len(labels))
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._bounds = torch.tensor(self._starts[1:])
        self._maps: dict[tuple[int, str], Tensor] = {}

    def _map(self, part: ShardPart, shard: int) -> Tensor:
        key = (shard, part.name)
        if key not in self._maps:
            self._maps[key] = part.map(self.folder, shard, self._starts[shard + 1] - self._starts[shard])
        return self._maps[key]

    def _gather(self, part: ShardPart, places: list[tuple[int, int, int]]) -> Tensor:
        """Rows of a part as int8 or float32, given (shard, row in it, place in the batch) in the order of the files."""
        found = torch.empty(len(places), *part.shape, dtype=torch.int8 if part.dtype == torch.int8 else torch.float32)
        for shard, row, place in places:
            found[place] = self._map(part, shard)[row]
        return found

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`.

        Raises:
            InputError: There is no such row.
        """
        for some, tokens, scales in self.stored_batches(rows, batch_size):
            if scales is not None:
                tokens = [
                    Tokens._make(None if x is None or by is None else dequantize(x, by) for x, by in zip(*layer))
                    for layer in zip(tokens, scales)
                ]
            yield some, tokens

    def stored_batches(
        self, rows: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, list[Tokens], list[Tokens] | None]]:
        """See `Features.stored_batches`.

        Raises:
            InputError: There is no such row.
        """
        int8 = self._parts[0].dtype == torch.int8
        for some in split_rows(rows, batch_size, len(self)):
            shards = torch.searchsorted(self._bounds, some, right=True).tolist()
            places = sorted(
                (shard, row - self._starts[shard], place)
                for place, (shard, row) in enumerate(zip(shards, some.tolist()))
            )
            tokens: list[dict[str, Tensor]] = [{} for _ in self.layers]
            scales: list[dict[str, Tensor]] = [{} for _ in self.layers]
            for part in self._parts:
                found = scales if part.name.endswith(".scale") else tokens
                found[part.layer][part.field] = self._gather(part, places)
            yield some, [Tokens(**layer) for layer in tokens], [Tokens(**layer) for layer in scales] if int8 else None
