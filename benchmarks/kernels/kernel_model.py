"""Time of compiled kernels on an H100, estimated from their instructions and bytes: a model, not a measurement.

    python -m benchmarks.kernels.kernel_model

Needs no GPU: nothing runs. Kernels are compiled for sm_90 and bfloat16 as their launchers do. Instructions are those of
the machine code, each loop's counted as often as it is run through; an issue slot takes one a clock for 32 threads, and
there are 4 in each of 132 multiprocessors at 1.755 GHz. Bytes are what must be read and written once, at 3.0 TB/s.

    issue_us     threads x instructions / (132 x 128 x 1.755 GHz)
    memory_us    bytes / 3.0 TB/s
    expected_us  the larger of memory_us and issue_us / 0.65

That a kernel issues 65 % of the time is assumed; caches, latency and what the tensor cores take are left out.
Writes results/kernel_model.csv.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel

from benchmarks.kernels.aot import compile_for
from benchmarks.kernels.kernel_resources import CASES
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.kernels._triton import halo_attention, match_attention

ISSUE = 132 * 128 * 1.755e9  # thread-instructions a second
BANDWIDTH = 3.0e12  # bytes per second
EFFICIENCY = 0.65


class Launch(NamedTuple):
    """A kernel's work in one call: threads, how often its loops are run through, outer ones first, and megabytes.

    `again` applies to a forward kernel with which the backward pass begins.
    """

    kernel: str
    threads: int
    trips: tuple[int, ...]
    megabytes: float
    again: bool = False


def instructions(compiled: CompiledKernel, trips: tuple[int, ...]) -> int:
    """Instructions that a thread executes, given the trips of the loops in the order in which they begin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    end = next(n for n, instruction in enumerate(code) if re.fullmatch(r"EXIT\s*", instruction)) + 1
    loops = []
    for n, instruction in enumerate(code[:end]):
        target = re.search(r"\bBRA\S*\s.*?`\((\.L_x_\d+)\)", instruction)
        if target and labels[target[1]] < n:
            loops.append((labels[target[1]], n + 1))
    if len(loops) != len(trips):
        raise SystemExit(f"{compiled.metadata.name} has {len(loops)} loops, but trips are known of {len(trips)}.")
    times = [1] * end
    for (first, last), count in zip(sorted(loops, key=lambda loop: (loop[0], -loop[1])), trips):
        times[first:last] = [count * value for value in times[first:last]]
    return sum(times)


def halo_launches(B: int, side: int, heads: int, D: int) -> Iterator[Launch]:
    """Blocks of 8, halo 3. A key's tile is seen by 2 x 2 blocks of queries, fewer at the border."""
    blocks, tiles = (side // 8) ** 2, (-(-(side + 3) // 8)) ** 2
    shape = halo_attention.Shape(D, D, 8, 3, 1, torch.bfloat16, from_shared=True)
    threads = 32 * halo_attention.OPTIONS["num_warps"] * B * heads

    def chunks(backward: bool) -> int:
        return -(-14 // halo_attention.tiles_of_queries(shape, backward).constants["ROWS"])

    map_mb = B * side**2 * heads * D * 2 / 1e6
    single_mb = B * side**2 * heads * 4 / 1e6
    tables_mb = B * blocks * heads * 2 * 27 * D * 4 / 1e6
    yield Launch("fwd", threads * blocks, (chunks(backward=False),), 4 * map_mb)
    yield Launch("fwd", threads * blocks, (chunks(backward=False),), 4 * map_mb + 2 * single_mb, again=True)
    yield Launch("bwd_q", threads * blocks, (chunks(backward=True),), 5 * map_mb + 2 * single_mb + tables_mb)
    # Block and tile meet four times a block; the two loops share it out over the tiles.
    yield Launch("bwd_kv", threads * tiles, (2, 2), 6 * map_mb + 2 * single_mb)


def match_launches(tokens: int, heads: int, D: int, radius: int) -> Iterator[Launch]:
    """Centres spread evenly: as many queries' windows begin at a pixel as there are heads' queries in one."""
    threads, keys, chunks = tokens * heads, (2 * radius + 2) ** 2, -(-D // 8)
    map_mb, attention_mb = threads * D * 2 / 1e6, threads * keys * 2 / 1e6
    field_mb = threads * 2 * 4 / 1e6
    yield Launch("fwd", threads, (chunks, chunks), 4 * map_mb + attention_mb + field_mb)
    # The attention and the slopes go to the second kernel in float32.
    kept = 4 * attention_mb
    yield Launch("bwd_q", threads, (chunks,) * 3, 5 * map_mb + attention_mb + kept + 3 * field_mb)
    yield Launch("bwd_kv", threads * chunks, (keys, 1), chunks * kept + 5 * map_mb)


def shapes() -> Iterator[tuple[str, str, str, Iterator[Launch]]]:
    """Operator, configuration of its compiled kernels, shape, launches."""
    for B, side, heads, D in ((64, 56, 4, 16), (256, 32, 4, 32), (1, 256, 4, 16), (1, 1024, 4, 16)):
        shape = f"{B}x{heads * D}x{side}x{side}, {heads} heads"
        yield "halo_attention", f"block 8, halo 3, D {D}", shape, halo_launches(B, side, heads, D)
    for height, width in ((1536, 1536), (2176, 3840)):
        for stride, radius, D in ((4, 1, 8), (8, 1, 16), (16, 2, 32), (32, 2, 40)):
            tokens = 2 * (height // stride) * (width // stride)
            shape = f"{height}x{width} at 1/{stride}, both views, 4 heads"
            block = match_attention.launch(4 * tokens, 4, D, D, radius, "l1", torch.bfloat16).block
            configuration = f"radius {radius}, D {D}, {block} threads"
            yield "match_attention", configuration, shape, match_launches(tokens, 4, D, radius)


def main() -> None:
    compiled, rows = {}, []
    for operator, common, shape, launches in shapes():
        for launch in launches:
            name, configuration = f"{operator}_{launch.kernel}_kernel", common + ", again" * launch.again
            if (name, configuration) not in compiled:
                (case,) = (
                    case
                    for case in CASES[operator]()
                    if (case.kernel.__name__, case.dtype, case.configuration) == (name, "bf16", configuration)
                    and 90 in case.chips
                )
                compiled[name, configuration] = compile_for(case.kernel, case.types, case.constants, 90, **case.options)
            executed = instructions(compiled[name, configuration], launch.trips)
            issue = 1e6 * launch.threads * executed / ISSUE
            memory = launch.megabytes * 1e12 / BANDWIDTH
            rows.append(
                {
                    "kernel": name + ", again" * launch.again,
                    "configuration": configuration,
                    "shape": shape,
                    "instructions": executed,
                    "megabytes": f"{launch.megabytes:.0f}",
                    "issue_us": f"{issue:.0f}",
                    "memory_us": f"{memory:.0f}",
                    "expected_us": f"{max(memory, issue / EFFICIENCY):.0f}",
                    **environment("cpu"),
                    "device": "sm_90, modelled",
                }
            )
            print(*list(rows[-1].values())[:8], sep=" | ", flush=True)
    write_rows(RESULTS / "kernel_model.csv", rows, key=("kernel", "shape"))


if __name__ == "__main__":
    main()
