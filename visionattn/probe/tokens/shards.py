"""Files of a feature store: format, writing, checking and reading.

A store is a folder named by the hash of all that its numbers depend on, which `meta.json` lists. Images are split into
shards of a fixed size. `000007.0.patches.bin` contains the patches of shard 7 at the first layer read, as raw numbers
in C order (n, N, D); `class` (n, D) and `registers` (n, R, D) exist if the layer has these tokens, and for int8 the
fp16 scales of the tokens, `....scale.bin` (n, N). `000007.json` has the shard's labels, the images that could not be
read, and size and CRC-32 of its files and of itself. It is written last: a shard without it is incomplete.
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
# Part of each store's hash: increase it if the file format changes.
FORMAT = 1


class ShardPart(NamedTuple):
    """One file of each shard."""

    layer: int
    field: str  # of Tokens
    name: str
    shape: tuple[int, ...]  # of an image
    dtype: torch.dtype

    def path(self, folder: Path, shard: int) -> Path:
        """Path of the file for a shard."""
        return folder / f"{shard:06d}.{self.name}.bin"

    def bytes(self, images: int) -> int:
        """Size of the file for a number of images."""
        return images * math.prod(self.shape) * self.dtype.itemsize

    def map(self, folder: Path, shard: int, images: int) -> Tensor:
        """The file as a memory-mapped tensor (n, ...)."""
        shape = (images, *self.shape)
        # Unlike numpy's maps, this keeps no file open: a large store has more shards than a process may open files.
        flat = torch.from_file(str(self.path(folder, shard)), shared=False, size=math.prod(shape), dtype=self.dtype)
        return flat.view(shape)


def shard_parts(layers: Sequence[Layer], precision: str) -> list[ShardPart]:
    """Files of a shard; scales of int8 tokens follow the tokens.

    Raises:
        ConfigError: The precision does not exist.
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
    """Tokens of a batch in their stored form."""

    tensors: list[Tensor]  # tokens, and for int8 their scales
    misfits: Tensor  # (B,), whether an image has values that are NaN, infinite or beyond the range of the precision


def encode(tokens: Tensor, dtype: torch.dtype) -> Encoded:
    """Convert tokens (B, ..., D) to a dtype; int8 has scales (B, ...) such that a token's largest magnitude is 127."""
    low, high = tokens.flatten(1).aminmax(dim=1)
    if dtype is not torch.int8:
        limit = torch.finfo(dtype).max
        # Comparisons with NaN are false.
        return Encoded([tokens.to(dtype).contiguous()], ~((high <= limit) & (low >= -limit)))
    half = torch.finfo(torch.float16)
    tokens = tokens.float()
    scale = (tokens.abs().amax(dim=-1) / 127).half()
    # Avoid a division by zero for tokens that are zero or nearly zero.
    step = scale.float().clamp_min(half.smallest_normal)
    values = (tokens / step.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    limit = 127 * half.max
    return Encoded([values, step.half()], ~((high <= limit) & (low >= -limit)))


class ShardWriter:
    """Writes the files of a shard under temporary names, which a later attempt overwrites."""

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
        with contextlib.suppress(OSError):  # on a full disk, flushing the buffer fails again
            self.stack.close()
        if kind is not None:
            for path in self.temporary:
                path.unlink(missing_ok=True)

    def _unwritten(self, error: OSError) -> StorageError:
        return StorageError(
            f"Could not write shard {self.number} to {self.folder}: {error.strerror or error}. Earlier shards are "
            "kept; the same call resumes after them."
        )

    def write(self, rows: Sequence[int], encoded: list[Encoded], ready: torch.cuda.Event | None) -> None:
        """Append the tokens of a batch.

        Args:
            rows: Indices of its images in the data set.
            encoded: Its tokens in main memory, in the order of the parts.
            ready: Event of the copy to main memory; None if it is complete.

        Raises:
            DataError: Tokens are NaN, infinite or beyond the range of the precision.
            StorageError: The disk is not writable.
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
                file.flush()  # raise the error of a full disk here, not when the file is closed
        except OSError as error:
            raise self._unwritten(error) from error

    def _refuse(self, layer: str, rows: list[int]) -> None:
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        named = [shorten(self.names[row]) if self.names is not None else str(row) for row in rows[:5]]
        rest = {
            torch.float16: "or above 65504, the maximum of fp16. Use the precision bf16 or fp32",
            torch.int8: "or beyond the range of int8's scales. Use the precision bf16 or fp32",
        }.get(self.parts[0].dtype, "as computed by the backbone. Check its weights")
        raise DataError(
            f"Tokens of layer {layer} are NaN or infinite, {rest}, and compute without autocast or in bfloat16. "
            f"Affected images: {', '.join(named)}{more}."
        )

    def finish(self) -> None:
        """Move the finished shard to its final names.

        Raises:
            StorageError: The disk is not writable.
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
    """Path of `000007.json` of a shard."""
    return folder / f"{shard:06d}.json"


def open_shard(
    folder: Path, shard: int, parts: Sequence[ShardPart], rows: range, classes: int, verify: bool
) -> dict[str, Any] | None:
    """Content of `000007.json`; None if the shard is incomplete.

    Args:
        folder: The store.
        shard: Index of the shard.
        parts: Its files.
        rows: Rows of the data set that belong to it.
        classes: Number of classes.
        verify: Compare the checksums of its files, which reads them.

    Raises:
        DataError: Its files were changed, or the shard belongs to other images.
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
            raise DataError(f"It must have {len(rows)} images; it has {len(labels) + len(content['skipped'])}.")
        if wrong := [label for label in labels if not 0 <= label < classes]:
            raise DataError(f"It has the label {wrong[0]}; there are {classes} classes.")
        for part in parts:
            file = part.path(folder, shard)
            size, known = file.stat().st_size, files[file.name]
            if not size == known["bytes"] == part.bytes(len(labels)):
                raise DataError(f"{file.name} must have {part.bytes(len(labels))} bytes; it has {size}.")
            if verify and _checksum(file) != known["crc32"]:
                raise DataError(f"The checksum of {file.name} differs from the recorded one.")
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
    """Write plain values with their checksum, completely or not at all; a file with equal content is not changed."""
    text = json.dumps({**content, "crc32": _checksum_of(content)}, indent=indent, ensure_ascii=False) + "\n"
    data = text.encode()
    if path.exists() and path.read_bytes() == data:
        return  # a finished store may be on a read-only disk
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_checked_json(path: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """Read a file of `write_json`; a file without a checksum is accepted.

    Raises:
        DataError: See `visionattn.files.read_json`; or the checksum is wrong.
    """
    content = read_json(path, schema)
    known = content.pop("crc32", None)
    if known is not None and known != _checksum_of(content):
        raise DataError(f"The checksum of {path.name} differs from the recorded one.")
    return content


def read_skipped(entries: Any, rows: range) -> list[tuple[int, str]]:
    """Rows of images that could not be read, with the reasons.

    Raises:
        DataError: An entry is invalid, or belongs to another row.
    """
    if not isinstance(entries, list):
        raise DataError("It does not list the images that could not be read.")
    for entry in entries:
        if not isinstance(entry, list) or [type(part) for part in entry] != [int, str] or entry[0] not in rows:
            raise DataError(f"An entry of the unreadable images is not valid: {shorten(entry)}.")
    return [(row, reason) for row, reason in entries]


def read_meta(folder: Path) -> dict[str, Any]:
    """Content of `meta.json` of a store.

    Raises:
        DataError: The folder is not a store, or is damaged.
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
            raise DataError("It has an invalid size.")
    except DataError as error:
        raise DataError(f"{shorten(folder)} is not a feature store, or is damaged: {error}") from error
    return meta
