"""Tokens of a data set: extracted once to memory-mapped files, or computed in each pass.

The file format of a store is documented in `visionattn.probe.tokens.shards`.
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
# Number of batches by which the backbone may be ahead of the disk; each is held in memory.
_AHEAD = 2


def estimate(backbone: Backbone, images: int, precision: str) -> int:
    """Size of the tokens of `images` images on disk, in bytes. The model may be on the meta device."""
    return sum(part.bytes(images) for part in shard_parts(backbone.layers, precision))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def _free(folder: Path) -> int:
    """Free space in bytes for a folder, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def space_line(backbone: Backbone, images: int, precision: str, folder: str | Path) -> str:
    """One line to print before an extraction: the required and the free disk space."""
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
    """Store the tokens of a data set, or open them if they are stored already.

    An interrupted run is resumed: finished shards are checked and kept, and with the same arguments on the same
    machine the files are byte-identical to those of an uninterrupted run. Damaged shards are computed again, with a
    warning. Images that cannot be read are skipped and listed in `meta.json`. Only one run at a time can write to a
    store. Under torch.distributed all processes call this, and each computes a share of the shards.

    Args:
        backbone: Backbone that computes the tokens.
        dataset: Map-style data set of (normalised float image (C, H, W), int label), always in the same order and
            without random augmentation.
        folder: Folder of the stores, each of which is a sub-folder.
        identity: Plain values on which the numbers depend and which the backbone does not know: `model` (its name),
            `transform` (its text) and `dataset` (which images, such as path and split).
        classes: Names of the classes.
        precision: `"fp16"`, `"bf16"`, `"fp32"`, or `"int8"` with one scale per token: half the space of fp16, with an
            error of at most 1 % of the token's largest magnitude (more for tokens wholly below 0.004).
        batch_size: Images per forward pass.
        num_workers: Loading processes.
        shard_images: Images per shard; an existing store keeps its own number.
        names: Names of the images in messages; None: their rows.
        progress: Display of the progress bar.

    Raises:
        ConfigError: The precision does not exist, or `identity` lacks an entry.
        InputError: The images do not have the backbone's size.
        DataError: The data set is empty, a label has no class, too many images cannot be read (more than 10 % and more
            than a few), or tokens are NaN, infinite or beyond the range of the precision.
        StorageError: There is not enough disk space, the disk is not writable, or another run is writing there.
    """
    parts = shard_parts(backbone.layers, precision)
    if missing := [key for key in _NAMED if key not in identity]:
        raise ConfigError(f"identity must have the entries {', '.join(_NAMED)}; it lacks {missing}.")
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
    """Read the size of shards from an existing store, and return whether it is complete.

    If the images differ from those in `meta.json`, every shard is extracted again.
    """
    if not (store / "meta.json").exists():
        return False
    try:
        found = read_meta(store)
    except DataError as error:
        warnings.warn(f"{error} The shards that match are kept.", stacklevel=3)
        return False
    if found["identity"] != _plain(meta["identity"]):
        raise DataError(f"{shorten(store)} contains the tokens of other images or of another backbone: delete it.")
    meta["shard_images"] = found["shard_images"]
    return found["complete"] and found["classes"] == meta["classes"] and found["layers"] == _plain(meta["layers"])


def _plain(value: Any) -> Any:
    """A value as JSON stores it: tuples become lists."""
    return json.loads(json.dumps(value))


def _spans(meta: Mapping[str, Any]) -> dict[int, range]:
    """Rows of each shard."""
    images, size = meta["identity"]["images"], meta["shard_images"]
    return {number: range(first, min(first + size, images)) for number, first in enumerate(range(0, images, size))}


def _look(store: Path, parts: Sequence[ShardPart], meta: Mapping[str, Any]) -> dict[int, dict[str, Any] | None]:
    """Summaries of this process's shards, after a check of their files; None for shards that must be extracted."""
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
    """Extract the missing shards of a store."""
    found = _look(store, parts, meta)
    spans = _spans(meta)
    rows = {shard: spans[shard] for shard, content in found.items() if content is None}
    skipped = [entry for content in found.values() if content for entry in content["skipped"]]
    needed = sum(together(lambda: estimate(backbone, sum(map(len, rows.values())), meta["identity"]["precision"])))
    free = _free(store)
    if needed > free:
        raise StorageError(
            f"The tokens require {_gigabytes(needed)}, but {shorten(store.parent)} has {_gigabytes(free)} free. "
            "Compute them in each pass (LiveFeatures), or store them in int8, at half the size of fp16."
        )

    def describe() -> None:
        if rank_and_size()[0] == 0:
            write_json(store / "meta.json", meta, indent=2)

    def write() -> list[tuple[int, str]]:
        for shard in rows:
            # A damaged shard must not look complete while it is overwritten.
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
    """Extract shards, given the rows of each, and add unreadable images to `skipped`."""
    cuts = {
        shard: [list(all[i : i + batch_size]) for i in range(0, len(all), batch_size)] for shard, all in rows.items()
    }
    loaded = read_batches(dataset, backbone.image_size, [cut for some in cuts.values() for cut in some], num_workers)
    bar = progress.add_task("tokens", total=sum(map(len, rows.values()))) if progress else None
    # Checking and writing a batch overlaps with computing the next one.
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
                    wait(pending)  # files must not be closed while they are being written
                shard.finish()


def _compute(
    backbone: Backbone, batch: ImageBatch, dtype: torch.dtype
) -> tuple[list[Encoded], torch.cuda.Event | None]:
    """Tokens of a batch in main memory; with a GPU they are complete when the event has completed."""
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
    """Tokens stored by `extract`, read through memory maps and returned as float32 on the CPU.

    Row i of `labels` is the i-th readable image of the data set.

    Args:
        folder: Folder of the store, which contains `meta.json`.
        verify: Compare the checksum of every file, which reads all of them once; False: compare only sizes.

    Attributes:
        folder: The folder.
        meta: Content of `meta.json`.
        skipped: Index in the data set of each image that could not be read, and the reason.

    Raises:
        DataError: The folder is not a store, the extraction did not finish, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        again = "Call extract again with the same arguments to compute the missing shards."
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
        """Rows as int8 or float32, from (shard, row in it, index in the batch) in the order of the files."""
        found = torch.empty(len(places), *part.shape, dtype=torch.int8 if part.dtype == torch.int8 else torch.float32)
        for shard, row, place in places:
            found[place] = self._map(part, shard)[row]
        return found

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`.

        Raises:
            InputError: A row does not exist.
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
            InputError: A row does not exist.
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
