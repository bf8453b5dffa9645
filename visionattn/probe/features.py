"""Tokens of a data set: extracted once to memory-mapped files, or computed at each pass.

A store is a folder named by the hash of all that its numbers depend on. `meta.json` says these in words. Images are cut
into shards of a fixed number; `000007.0.patches.bin` holds the patches of shard 7 at the first layer read, bare numbers
in C order (n, N, D), beside it `class` (n, D) and `registers` (n, R, D) where there are some, and for int8 the fp16
scales of the tokens, `....scale.bin` (n, N). `000007.json` has the shard's labels, the images that could not be read,
and size and CRC-32 of its files; it is written last, so that a shard without it is no shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from visionattn.data.samplers import ResumableLoader
from visionattn.errors import ConfigError, DataError, InputError, StorageError
from visionattn.files import atomic_path
from visionattn.probe.backbone import Backbone
from visionattn.probe.processes import rank_and_size, together
from visionattn.probe.tokens import Features, Layer, Tokens
from visionattn.weights.hashing import hash_state

__all__ = [
    "PRECISIONS",
    "LiveFeatures",
    "ReadableImages",
    "StoredFeatures",
    "estimate",
    "extract",
    "find_readable",
    "space_line",
]

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
_NAMED = ("model", "transform", "dataset")
# Part of each store's hash: raise it when the files are written in another way.
_FORMAT = 1
_UNREADABLE_SHARE = 0.1
# Batches that the backbone may be ahead of the disk; each is held in memory.
_AHEAD = 2


class _Part(NamedTuple):
    """One file of each shard."""

    layer: int
    field: str  # of Tokens
    name: str
    shape: tuple[int, ...]  # of an image
    dtype: torch.dtype

    def path(self, folder: Path, shard: int) -> Path:
        return folder / f"{shard:06d}.{self.name}.bin"

    def bytes(self, images: int) -> int:
        return images * math.prod(self.shape) * self.dtype.itemsize


def _parts(layers: Sequence[Layer], precision: str) -> list[_Part]:
    """The files of a shard; the scales of int8 follow their numbers."""
    if precision not in PRECISIONS:
        raise ConfigError(f"There is no precision {precision!r}. Choose from {', '.join(PRECISIONS)}.")
    found = []
    for number, layer in enumerate(layers):
        shapes: dict[str, tuple[int, ...]] = {"patches": (layer.grid[0] * layer.grid[1], layer.dim)}
        if layer.has_class:
            shapes["class_token"] = (layer.dim,)
        if layer.num_registers:
            shapes["registers"] = (layer.num_registers, layer.dim)
        for field, shape in shapes.items():
            name = f"{number}.{field.removesuffix('_token')}"
            found.append(_Part(number, field, name, shape, PRECISIONS[precision]))
            if precision == "int8":
                found.append(_Part(number, field, f"{name}.scale", shape[:-1], torch.float16))
    return found


def estimate(backbone: Backbone, images: int, precision: str) -> int:
    """Size of the tokens of `images` images on disk, in bytes. The model may lie on the meta device."""
    return sum(part.bytes(images) for part in _parts(backbone.layers, precision))


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


# --- reading images ---------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """The readable images of a batch."""

    rows: list[int]
    images: Tensor | None  # None where none could be read
    labels: list[int]
    skipped: list[tuple[int, str]]


class _Guarded(Dataset):
    """Gives what is wrong with an image in the place of an error."""

    def __init__(self, dataset: Any, size: tuple[int, int] | None) -> None:
        self.dataset = dataset
        self.size = size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None, int, str]:
        try:
            image, label = self.dataset[row]
        except Exception as error:  # broken files make readers raise nearly anything
            return row, None, -1, str(error) or type(error).__name__
        if self.size is None:
            return row, None, int(label), ""
        if not isinstance(image, Tensor) or tuple(image.shape[1:]) != self.size:
            given = f"{tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise InputError(
                f"The data set's images must be tensors (C, {self.size[0]}, {self.size[1]}) for this backbone; "
                f"image {row} is {given}."
            )
        return row, image, int(label), ""


def _collate(samples: list[tuple[int, Tensor | None, int, str]]) -> _Batch:
    images = [image for _, image, _, _ in samples if image is not None]
    good = [(row, label) for row, _, label, wrong in samples if not wrong]
    skipped = [(row, wrong) for row, _, _, wrong in samples if wrong]
    return _Batch(
        [row for row, _ in good], torch.stack(images) if images else None, [label for _, label in good], skipped
    )


def _read(dataset: Any, size: tuple[int, int] | None, batches: list[list[int]], num_workers: int) -> Iterator[_Batch]:
    """Load batches of rows in order; without a size, labels only, after the images were opened."""
    loader = ResumableLoader(
        _Guarded(dataset, size),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=size is not None and torch.cuda.is_available(),
        generator=torch.Generator(),  # the global one belongs to the training
    )
    return iter(loader)


def _check_share(skipped: Sequence[tuple[int, str]], images: int) -> None:
    if len(skipped) > _UNREADABLE_SHARE * images:
        row, reason = skipped[0]
        raise DataError(
            f"More than {_UNREADABLE_SHARE:.0%} of the {images} images cannot be read. The first is image {row}: "
            f"{reason}"
        )


class ReadableImages(NamedTuple):
    """Which images of a data set can be read.

    Attributes:
        rows: Their places in the data set, int64 (n,).
        labels: Their classes, int64 (n,).
        skipped: Place of each other image, and what is wrong with it.
    """

    rows: Tensor
    labels: Tensor
    skipped: list[tuple[int, str]]


def find_readable(dataset: Any, num_workers: int = 0) -> ReadableImages:
    """Open every image once, as `LiveFeatures` takes none that cannot be read.

    `torch.utils.data.Subset(dataset, found.rows.tolist())` holds the images that `extract` would store.

    Args:
        dataset: Map-style data set of (image, label).
        num_workers: Loading processes.

    Raises:
        DataError: More than 10 % cannot be read.
    """
    rows, labels, skipped = [], [], []
    places = list(range(len(dataset)))
    batches = [places[i : i + 64] for i in range(0, len(places), 64)]
    for batch in _read(dataset, None, batches, num_workers):
        rows += batch.rows
        labels += batch.labels
        skipped += batch.skipped
        _check_share(skipped, len(dataset))
    return ReadableImages(torch.tensor(rows), torch.tensor(labels), skipped)


# --- writing ----------------------------------------------------------------------------------------------------------


class _Encoded(NamedTuple):
    """A part of a batch as it will be stored."""

    tensors: list[Tensor]  # numbers, and for int8 their scales
    misfits: Tensor  # (B,), whether an image's numbers are NaN, infinite or beyond the precision


def _encode(tokens: Tensor, dtype: torch.dtype) -> _Encoded:
    """Numbers (B, ..., D) in a dtype; int8 has a scale (B, ...) such that a token's largest magnitude is 127."""
    low, high = tokens.flatten(1).aminmax(dim=1)
    if dtype is not torch.int8:
        limit = torch.finfo(dtype).max
        # Comparisons with NaN are false.
        return _Encoded([tokens.to(dtype).contiguous()], ~((high <= limit) & (low >= -limit)))
    half = torch.finfo(torch.float16)
    tokens = tokens.float()
    scale = (tokens.abs().amax(dim=-1) / 127).half()
    # Tokens of zeros, or nearly, shall not be divided by 0.
    step = scale.float().clamp_min(half.smallest_normal)
    values = (tokens / step.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    limit = 127 * half.max
    return _Encoded([values, step.half()], ~((high <= limit) & (low >= -limit)))


class _Shard:
    """The files of a shard while it is written: under names of their own, which a later try overwrites."""

    def __init__(self, folder: Path, number: int, layers: Sequence[Layer], parts: Sequence[_Part]) -> None:
        self.folder, self.number, self.layers, self.parts = folder, number, layers, parts
        self.labels: list[int] = []
        self.skipped: list[tuple[int, str]] = []
        self.sums = [0] * len(parts)
        self.paths = [part.path(folder, number) for part in parts]
        self.temporary = [path.with_suffix(".part") for path in self.paths]
        self.files: list[BinaryIO] = []

    def __enter__(self) -> _Shard:
        self.stack = contextlib.ExitStack()
        try:
            self.files = [self.stack.enter_context(path.open("wb")) for path in self.temporary]
        except OSError as error:
            self.stack.close()
            raise self._unwritten(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk refuses what is left in the buffer once more
            self.stack.close()
        if kind is not None:
            for path in self.temporary:
                path.unlink(missing_ok=True)

    def _unwritten(self, error: OSError) -> StorageError:
        return StorageError(
            f"Could not write shard {self.number} to {self.folder}: {error.strerror or error}. The shards before it "
            "stay; the same call goes on behind them."
        )

    def write(self, batch: _Batch, encoded: list[_Encoded], ready: torch.cuda.Event | None) -> None:
        """Append the tokens of a batch when they have arrived."""
        if ready is not None:
            ready.synchronize()
        heads = [part for part in self.parts if not part.name.endswith(".scale")]
        for part, one in zip(heads, encoded):
            if one.misfits.any():
                self._refuse(self.layers[part.layer].name, [batch.rows[i] for i in one.misfits.nonzero().flatten()])
        tensors = [tensor for one in encoded for tensor in one.tensors]
        try:
            for number, (file, tensor) in enumerate(zip(self.files, tensors)):
                data: Any = tensor.flatten().view(torch.uint8).numpy()
                self.sums[number] = zlib.crc32(data, self.sums[number])
                file.write(data)
                file.flush()  # a full disk shall be met here, not when the file is closed
        except OSError as error:
            raise self._unwritten(error) from error

    def _refuse(self, layer: str, rows: list[int]) -> None:
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        rest = {
            torch.float16: "or beyond fp16, which ends at 65504. Take the precision bf16 or fp32",
            torch.int8: "or beyond the range of int8's scales. Take the precision bf16 or fp32",
        }.get(self.parts[0].dtype, "as the backbone computes them. Check its weights")
        raise DataError(
            f"Tokens of the layer {layer} are NaN or infinite, {rest}, and compute without autocast or in bfloat16. "
            f"They are those of the images: {', '.join(map(str, rows[:5]))}{more}."
        )

    def finish(self) -> None:
        """Let the shard appear."""
        try:
            self.stack.close()
            for temporary, path in zip(self.temporary, self.paths):
                temporary.replace(path)
        except OSError as error:
            raise self._unwritten(error) from error
        files = {
            path.name: {"bytes": part.bytes(len(self.labels)), "crc32": f"{total:08x}"}
            for path, part, total in zip(self.paths, self.parts, self.sums)
        }
        content = {"labels": self.labels, "skipped": self.skipped, "files": files}
        _write_json(_summary(self.folder, self.number), content, indent=None)


def _summary(folder: Path, shard: int) -> Path:
    return folder / f"{shard:06d}.json"


def _write_json(path: Path, content: Any, indent: int | None) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return  # finished stores may lie on a disk that is read only
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _open_shard(folder: Path, shard: int, parts: Sequence[_Part], verify: bool) -> dict[str, Any] | None:
    """What `000007.json` says, or None where the shard was not finished.

    Raises:
        DataError: Its files are not those that were written.
    """
    path = _summary(folder, shard)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels, files = content["labels"], content["files"]
        content["skipped"] = [(row, reason) for row, reason in content["skipped"]]
        for part in parts:
            file = part.path(folder, shard)
            size, known = file.stat().st_size, files[file.name]
            if not size == known["bytes"] == part.bytes(len(labels)):
                raise DataError(f"{file} has {size} bytes in place of {known['bytes']}.")
            if verify and _checksum(file) != known["crc32"]:
                raise DataError(f"The checksum of {file} is not the one that was written down.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The shard {path} is damaged: {error}.") from error
    return content


def _checksum(path: Path) -> str:
    total = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            total = zlib.crc32(data, total)
    return f"{total:08x}"


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
    progress: Progress | None = None,
) -> StoredFeatures:
    """Store the tokens of a data set, or open them where they are stored already.

    A run that ended early goes on: finished shards are checked and kept, and with the same arguments on the same
    machine the files come out byte for byte as without the interruption. Damaged shards are computed again, with a
    warning. Images that cannot be read are left out and listed in `meta.json`. Two runs must not write to one store.
    Under torch.distributed all processes call this, and each computes a part of the shards.

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
        progress: Display in which a bar of images is shown.

    Raises:
        ConfigError: There is no such precision, or `identity` lacks an entry.
        InputError: The images do not have the backbone's size.
        DataError: The data set is empty, a label has no class, more than 10 % of the images cannot be read, or tokens
            are NaN, infinite or beyond the precision.
        StorageError: The disk has no room for the tokens, or cannot be written.
    """
    parts = _parts(backbone.layers, precision)
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
        "format": _FORMAT,
    }
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    store = Path(folder) / key[:16]
    if (store / "meta.json").exists():
        shard_images = _read_meta(store)["shard_images"]
    meta = {
        "identity": known,
        "classes": list(classes),
        "shard_images": shard_images,
        "layers": [asdict(layer) for layer in backbone.layers],
        "complete": False,
    }

    process, processes = rank_and_size()
    missing_shards, skipped = [], []
    for shard in range(process, math.ceil(images / shard_images), processes):
        try:
            content = _open_shard(store, shard, parts, verify=True)
        except DataError as error:
            warnings.warn(f"{error} Shard {shard} is extracted again.", stacklevel=2)
            content = None
        if content is None:
            missing_shards.append(shard)
            # What a damaged shard left must not stand as finished while it is overwritten.
            _summary(store, shard).unlink(missing_ok=True)
        else:
            skipped += content["skipped"]
    rows = {shard: range(shard * shard_images, min((shard + 1) * shard_images, images)) for shard in missing_shards}
    needed = sum(together(lambda: estimate(backbone, sum(map(len, rows.values())), precision)))
    free = _free(store)
    if needed > free:
        raise StorageError(
            f"The tokens would take {_gigabytes(needed)}, and {folder} has {_gigabytes(free)} free. Compute them at "
            "each pass (LiveFeatures), or store them in int8 at half the size of fp16."
        )

    def describe() -> None:
        if process == 0:
            _write_json(store / "meta.json", meta, indent=2)

    def write() -> list[tuple[int, str]]:
        if rows:
            _write_shards(
                backbone, dataset, store, parts, rows, skipped, batch_size, num_workers, len(classes), progress
            )
        return skipped

    if needed:
        together(describe)
    skipped = sorted(entry for part in together(write) for entry in part)
    meta |= {"complete": True, "readable": images - len(skipped), "skipped": skipped}
    together(describe)
    return StoredFeatures(store, verify=False)


def _write_shards(
    backbone: Backbone,
    dataset: Any,
    store: Path,
    parts: Sequence[_Part],
    rows: Mapping[int, range],
    skipped: list[tuple[int, str]],
    batch_size: int,
    num_workers: int,
    num_classes: int,
    progress: Progress | None,
) -> None:
    """Extract shards, given the rows of each, and add to `skipped` the images that cannot be read."""
    cuts = {
        shard: [list(all[i : i + batch_size]) for i in range(0, len(all), batch_size)] for shard, all in rows.items()
    }
    loaded = _read(dataset, backbone.image_size, [cut for some in cuts.values() for cut in some], num_workers)
    bar = progress.add_task("tokens", total=sum(map(len, rows.values()))) if progress else None
    # Checking and writing a batch overlaps with computing the next.
    with ThreadPoolExecutor(1) as writer:
        for number, shard_cuts in cuts.items():
            with _Shard(store, number, backbone.layers, parts) as shard:
                pending: deque[Future] = deque()
                try:
                    for _ in shard_cuts:
                        batch = next(loaded)
                        skipped += batch.skipped
                        _check_share(skipped, len(dataset))
                        if wrong := [label for label in batch.labels if not 0 <= label < num_classes]:
                            raise DataError(f"The data set has the label {wrong[0]}; there are {num_classes} classes.")
                        shard.labels += batch.labels
                        shard.skipped += batch.skipped
                        if batch.images is not None:
                            pending.append(
                                writer.submit(shard.write, batch, *_compute(backbone, batch, parts[0].dtype))
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


def _compute(backbone: Backbone, batch: _Batch, dtype: torch.dtype) -> tuple[list[_Encoded], torch.cuda.Event | None]:
    """Tokens of a batch in main memory, on a GPU once the event has passed."""
    assert batch.images is not None
    encoded = [_encode(part, dtype) for tokens in backbone(batch.images) for part in tokens if part is not None]
    if backbone.device.type != "cuda":
        return encoded, None
    moved = [
        _Encoded(
            [tensor.to("cpu", non_blocking=True) for tensor in one.tensors], one.misfits.to("cpu", non_blocking=True)
        )
        for one in encoded
    ]
    ready = torch.cuda.Event()
    ready.record()
    return moved, ready


# --- the two kinds of features ----------------------------------------------------------------------------------------


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no feature store, or a damaged one: {error}.") from error


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
        DataError: The folder is no store, the extraction did not finish, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        again = "Call extract again with the same arguments: it computes what is missing."
        if not self.meta["complete"]:
            raise DataError(f"The extraction to {folder} did not finish. {again}")
        self.layers = tuple(Layer(**{**layer, "grid": tuple(layer["grid"])}) for layer in self.meta["layers"])
        self.classes = tuple(self.meta["classes"])
        self.skipped = [(row, reason) for row, reason in self.meta["skipped"]]
        self._parts = _parts(self.layers, self.meta["identity"]["precision"])
        labels: list[int] = []
        self._starts = [0]
        for shard in range(math.ceil(self.meta["identity"]["images"] / self.meta["shard_images"])):
            try:
                content = _open_shard(self.folder, shard, self._parts, verify)
            except DataError as error:
                raise DataError(f"{error} {again}") from error
            if content is None:
                raise DataError(f"{folder} lacks shard {shard}. {again}")
            labels += content["labels"]
            self._starts.append(len(labels))
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._bounds = torch.tensor(self._starts[1:])
        self._maps: dict[tuple[int, str], Tensor] = {}

    def _map(self, part: _Part, shard: int) -> Tensor:
        """A file as a tensor (n, ...), of which pages are read when touched."""
        key = (shard, part.name)
        if key not in self._maps:
            shape = (self._starts[shard + 1] - self._starts[shard], *part.shape)
            # Unlike numpy's maps it keeps no file open: a large store has more shards than a process may open files.
            flat = torch.from_file(
                str(part.path(self.folder, shard)), shared=False, size=math.prod(shape), dtype=part.dtype
            )
            self._maps[key] = flat.view(shape)
        return self._maps[key]

    def _gather(self, part: _Part, places: list[tuple[int, int, int]]) -> Tensor:
        """Rows of a part as float32, given (shard, row in it, place in the batch) in the order of the files."""
        found = torch.empty(len(places), *part.shape)
        for shard, row, place in places:
            found[place] = self._map(part, shard)[row]
        return found

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`.

        Raises:
            InputError: There is no such row.
        """
        for some in _split(rows, batch_size, len(self)):
            shards = torch.searchsorted(self._bounds, some, right=True).tolist()
            places = sorted(
                (shard, row - self._starts[shard], place)
                for place, (shard, row) in enumerate(zip(shards, some.tolist()))
            )
            tokens: list[dict[str, Tensor]] = [{} for _ in self.layers]
            for part in self._parts:
                values = self._gather(part, places)
                at = tokens[part.layer]
                at[part.field] = at[part.field].mul_(values.unsqueeze(-1)) if part.field in at else values
            yield some, [Tokens(**found) for found in tokens]


class LiveFeatures(Features):
    """Tokens that the backbone computes at each pass, given as float32 on its device.

    Args:
        backbone: Gives the tokens.
        dataset: Map-style data set of (normalised float image (C, H, W), int label), without random augmentation.
        labels: Class of each image, int64 (n,).
        classes: Names of the classes.
        num_workers: Loading processes.

    Raises:
        InputError: There are not as many labels as images.
    """

    def __init__(
        self, backbone: Backbone, dataset: Any, labels: Tensor, classes: Sequence[str], num_workers: int = 0
    ) -> None:
        if len(labels) != len(dataset):
            raise InputError(f"There are {len(labels)} labels for {len(dataset)} images.")
        self.backbone = backbone
        self.dataset = dataset
        self.layers = backbone.layers
        self.labels = labels
        self.classes = tuple(classes)
        self.num_workers = num_workers

    def batches(self, rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, list[Tokens]]]:
        """See `Features.batches`. The backbone takes a batch at once.

        Raises:
            InputError: There is no such row, or images do not have the backbone's size.
            DataError: An image cannot be read, or its tokens are NaN or infinite.
        """
        split = _split(rows, batch_size, len(self))
        loaded = _read(self.dataset, self.backbone.image_size, [some.tolist() for some in split], self.num_workers)
        for some, batch in zip(split, loaded):
            if batch.skipped:
                row, reason = batch.skipped[0]
                raise DataError(
                    f"Image {row} cannot be read: {reason} find_readable() lists the images that can; take these only."
                )
            assert batch.images is not None
            tokens = [
                Tokens._make(None if part is None else part.float() for part in found)
                for found in self.backbone(batch.images)
            ]
            for layer, found in zip(self.layers, tokens):
                if not all(part.isfinite().all() for part in found if part is not None):
                    raise DataError(
                        f"Tokens of the layer {layer.name} are NaN or infinite. Check the backbone's weights, and "
                        f"compute without autocast or in bfloat16. They are among the images: {some.tolist()}."
                    )
            yield some, tokens


def _split(rows: Tensor, batch_size: int, count: int) -> tuple[Tensor, ...]:
    """Cut rows into batches, if there are such rows."""
    if len(rows) == 0:
        return ()
    low, high = rows.min().item(), rows.max().item()
    if low < 0 or high >= count:
        raise InputError(f"There are the rows 0 to {count - 1}; asked for {low} to {high}.")
    return rows.split(batch_size)
