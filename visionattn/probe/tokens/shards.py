"""The files of a feature store: how tokens lie on the disk, are written, checked and read.

A store is a folder named by the hash of all that its numbers depend on. `meta.json` says these in words. Images are cut
into shards of a fixed number; `000007.0.patches.bin` holds the patches of shard 7 at the first layer read, bare numbers
in C order (n, N, D), beside it `class` (n, D) and `registers` (n, R, D) where there are some, and for int8 the fp16
scales of the tokens, `....scale.bin` (n, N). `000007.json` has the shard's labels, the images that could not be read,
and size and CRC-32 of its files and of itself; it is written last, so that a shard without it is incomplete.
"""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from visionattn.errors import ConfigError, DataError, StorageError, shorten
from visionattn.files import atomic_path, read_json
from visionattn.probe.tokens.interface import Layer

__all__ = [
    "FORMAT",
    "PRECISIONS",
    "Encoded",
    "ShardPart",
    "ShardWriter",
    "encode",
    "open_shard",
    "read_checked_json",
    "read_meta",
    "read_skipped",
    "shard_parts",
    "summary_file",
    "write_json",
]

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
# Part of each store's hash: raise it when the files are written in another way.
FORMAT = 1


class ShardPart(NamedTuple):
    """One file of each shard."""

    layer: int
    field: str  # of Tokens
    name: str
    shape: tuple[int, ...]  # of an image
    dtype: torch.dtype

    def path(self, folder: Path, shard: int) -> Path:
        """Where it stands for a shard."""
        return folder / f"{shard:06d}.{self.name}.bin"

    def bytes(self, images: int) -> int:
        """Its size for a number of images."""
        return images * math.prod(self.shape) * self.dtype.itemsize

    def map(self, folder: Path, shard: int, images: int) -> Tensor:
        """The file as a tensor (n, ...), of which pages are read when touched."""
        shape = (images, *self.shape)
        # Unlike numpy's maps it keeps no file open: a large store has more shards than a process may open files.
        flat = torch.from_file(str(self.path(folder, shard)), shared=False, size=math.prod(shape), dtype=self.dtype)
        return flat.view(shape)


def shard_parts(layers: Sequence[Layer], precision: str) -> list[ShardPart]:
    """The files of a shard; the scales of int8 follow their numbers.

    Raises:
        ConfigError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}.")
    found = []
    for number, layer in enumerate(layers):
        shapes: dict[str, tuple[int, ...]] = {"patches": (layer.grid[0] * layer.grid[1], layer.dim)}
        if layer.has_class:
            shapes["class_token"] = (layer.dim,)
        if layer.num_registers:
            shapes["registers"] = (layer.num_registers, layer.dim)
        for field, shape in shapes.items():
            name = f"{number}.{field.removesuffix('_token')}"
            found.append(ShardPart(number, field, name, shape, PRECISIONS[precision]))
            if precision == "int8":
                found.append(ShardPart(number, field, f"{name}.scale", shape[:-1], torch.float16))
    return found


class Encoded(NamedTuple):
    """A part of a batch as it will be stored."""

    tensors: list[Tensor]  # numbers, and for int8 their scales
    misfits: Tensor  # (B,), whether an image's numbers are NaN, infinite or beyond the precision


def encode(tokens: Tensor, dtype: torch.dtype) -> Encoded:
    """Numbers (B, ..., D) in a dtype; int8 has a scale (B, ...) such that a token's largest magnitude is 127."""
    low, high = tokens.flatten(1).aminmax(dim=1)
    if dtype is not torch.int8:
        limit = torch.finfo(dtype).max
        # Comparisons with NaN are false.
        return Encoded([tokens.to(dtype).contiguous()], ~((high <= limit) & (low >= -limit)))
    half = torch.finfo(torch.float16)
    tokens = tokens.float()
    scale = (tokens.abs().amax(dim=-1) / 127).half()
    # Tokens of zeros, or nearly, shall not be divided by 0.
    step = scale.float().clamp_min(half.smallest_normal)
    values = (tokens / step.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    limit = 127 * half.max
    return Encoded([values, step.half()], ~((high <= limit) & (low >= -limit)))


class ShardWriter:
    """The files of a shard while it is written: under names of their own, which a later try overwrites."""

    def __init__(
        self,
        folder: Path,
        number: int,
        layers: Sequence[Layer],
        parts: Sequence[ShardPart],
        names: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.number, self.layers, self.parts, self.names = folder, number, layers, parts, names
        self.labels: list[int] = []
        self.skipped: list[tuple[int, str]] = []
        self.sums = [0] * len(parts)
        self.paths = [part.path(folder, number) for part in parts]
        self.temporary = [path.with_suffix(".part") for path in self.paths]
        self.files: list[BinaryIO] = []

    def __enter__(self) -> ShardWriter:
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

    def write(self, rows: Sequence[int], encoded: list[Encoded], ready: torch.cuda.Event | None) -> None:
        """Append the tokens of a batch.

        Args:
            rows: Places of its images in the data set.
            encoded: Its tokens in main memory, in the order of the parts.
            ready: When they have arrived there; None where they are there already.

        Raises:
            DataError: Tokens are NaN, infinite or beyond the precision.
            StorageError: The disk cannot be written.
        """
        if ready is not None:
            ready.synchronize()
        heads = [part for part in self.parts if not part.name.endswith(".scale")]
        for part, one in zip(heads, encoded):
            if one.misfits.any():
                self._refuse(self.layers[part.layer].name, [rows[i] for i in one.misfits.nonzero().flatten()])
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
        named = [shorten(self.names[row]) if self.names is not None else str(row) for row in rows[:5]]
        rest = {
            torch.float16: "or beyond fp16, which ends at 65504. Take the precision bf16 or fp32",
            torch.int8: "or beyond the range of int8's scales. Take the precision bf16 or fp32",
        }.get(self.parts[0].dtype, "as the backbone computes them. Check its weights")
        raise DataError(
            f"Tokens of the layer {layer} are NaN or infinite, {rest}, and compute without autocast or in bfloat16. "
            f"They are those of the images: {', '.join(named)}{more}."
        )

    def finish(self) -> None:
        """Let the shard appear.

        Raises:
            StorageError: The disk cannot be written.
        """
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
        write_json(summary_file(self.folder, self.number), content, indent=None)


def summary_file(folder: Path, shard: int) -> Path:
    """Where `000007.json` of a shard stands."""
    return folder / f"{shard:06d}.json"


def open_shard(
    folder: Path, shard: int, parts: Sequence[ShardPart], rows: range, classes: int, verify: bool
) -> dict[str, Any] | None:
    """What `000007.json` says, or None where the shard was not finished.

    Args:
        folder: The store.
        shard: Number of the shard.
        parts: Its files.
        rows: Rows of the data set that belong to it.
        classes: Number of classes.
        verify: Compare the checksums of its files, which reads them.

    Raises:
        DataError: Its files are not those that were written, or it is the shard of other images.
    """
    path = summary_file(folder, shard)
    if not path.exists():
        return None
    names = [part.path(folder, shard).name for part in parts]
    schema = {"labels": [int], "skipped": list, "files": {name: {"bytes": int, "crc32": str} for name in names}}
    try:
        content = read_checked_json(path, schema)
        labels, files = content["labels"], content["files"]
        content["skipped"] = read_skipped(content["skipped"], rows)
        if len(labels) + len(content["skipped"]) != len(rows):
            raise DataError(f"It has {len(labels) + len(content['skipped'])} images instead of {len(rows)}.")
        if wrong := [label for label in labels if not 0 <= label < classes]:
            raise DataError(f"It has the label {wrong[0]}; there are {classes} classes.")
        for part in parts:
            file = part.path(folder, shard)
            size, known = file.stat().st_size, files[file.name]
            if not size == known["bytes"] == part.bytes(len(labels)):
                raise DataError(f"{file.name} has {size} bytes instead of {part.bytes(len(labels))}.")
            if verify and _checksum(file) != known["crc32"]:
                raise DataError(f"The checksum of {file.name} is not the recorded one.")
    except OSError as error:
        raise DataError(f"The shard {shorten(path)} is damaged: {shorten(error)}.") from error
    except DataError as error:
        raise DataError(f"The shard {shorten(path)} is damaged: {error}") from error
    return content


def _checksum(path: Path) -> str:
    total = 0
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            total = zlib.crc32(data, total)
    return f"{total:08x}"


def _checksum_of(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def write_json(path: Path, content: dict[str, Any], indent: int | None) -> None:
    """Write plain values with their checksum, whole or not at all; a file that says the same already is left alone."""
    text = json.dumps({**content, "crc32": _checksum_of(content)}, indent=indent, ensure_ascii=False) + "\n"
    data = text.encode()
    if path.exists() and path.read_bytes() == data:
        return  # finished stores may lie on a disk that is read only
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_checked_json(path: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """Read what `write_json` wrote; a file without a checksum is taken as it is.

    Raises:
        DataError: As `visionattn.files.read_json`, or the checksum is wrong.
    """
    content = read_json(path, schema)
    known = content.pop("crc32", None)
    if known is not None and known != _checksum_of(content):
        raise DataError(f"The checksum of {path.name} is not the recorded one.")
    return content


def read_skipped(entries: Any, rows: range) -> list[tuple[int, str]]:
    """Rows of images that could not be read, with the reasons.

    Raises:
        DataError: An entry is something else, or of another row.
    """
    if not isinstance(entries, list):
        raise DataError("It does not list the images that could not be read.")
    for entry in entries:
        if not isinstance(entry, list) or [type(part) for part in entry] != [int, str] or entry[0] not in rows:
            raise DataError(f"An image that could not be read is given as {shorten(entry)}.")
    return [(row, reason) for row, reason in entries]


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` of a store says.

    Raises:
        DataError: The folder is not a store, or a damaged one.
    """
    layer = {"name": str, "dim": int, "grid": [int], "has_class": bool, "num_registers": int}
    schema = {
        "identity": {"images": int, "precision": str},
        "classes": [str],
        "shard_images": int,
        "layers": [layer],
        "complete": bool,
    }
    try:
        meta = read_checked_json(folder / "meta.json", schema)
        if meta["complete"]:
            meta["skipped"] = read_skipped(meta.get("skipped"), range(meta["identity"]["images"]))
        sizes = [meta["shard_images"], meta["identity"]["images"]]
        sizes += [size for layer in meta["layers"] for size in (layer["dim"], *layer["grid"])]
        if min(sizes) < 1 or any(len(layer["grid"]) != 2 or layer["num_registers"] < 0 for layer in meta["layers"]):
            raise DataError("A size in it is not one.")
    except DataError as error:
        raise DataError(f"{shorten(folder)} is not a feature store, or is damaged: {error}") from error
    return meta
