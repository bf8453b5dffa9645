"""The documentation's tables of operators and kernels."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.markdown import calls, machines, markdown, plain
from benchmarks.report import RESULTS, read_rows


def kernel_resources() -> str:
    """What compiled kernels take, by operator, dtype and version of Triton, over all chips and configurations."""
    rows = read_rows(RESULTS / "kernel_resources.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        operator = re.sub(r"_(fwd|bwd)_.*", "", row["kernel"])
        groups.setdefault((operator, row["dtype"], row["triton"]), []).append(row)
    head = [
        "operator",
        "dtype",
        "Triton",
        "compiled",
        "registers",
        "shared bytes",
        "use tensor cores",
        "that spill",
        "largest spill, bytes",
    ]
    body = []
    for (operator, dtype, triton), found in sorted(groups.items()):
        spilled = [int(row["stack"]) + int(row["local"]) for row in found]
        registers = sorted(int(row["registers"]) for row in found)
        body.append(
            [
                f"`{operator}`",
                dtype,
                triton,
                str(len(found)),
                f"{registers[0]} to {registers[-1]}",
                f"{max(int(row['shared']) for row in found):,}",
                str(sum(row["tensor_core"] != "0" for row in found)),
                str(sum(map(bool, spilled))),
                f"{max(spilled):,}",
            ]
        )
    return markdown(head, body) + "\nsm_80, sm_90 and sm_100; compiled only.\n"


def kernel_model() -> str:
    """Modelled times by kernel and shape."""
    rows = read_rows(RESULTS / "kernel_model.csv")
    if not rows:
        return "Not computed yet.\n"
    head = ["shape", "kernel", "instructions per thread", "MB", "issue us", "memory us", "expected us"]
    keys = ("instructions", "megabytes", "issue_us", "memory_us", "expected_us")
    return markdown(head, ([row["shape"], f"`{row['kernel']}`", *(row[key] for key in keys)] for row in rows))


def cpu_bfloat16() -> str:
    """Speed-ups of operators over their definitions in bfloat16 on a CPU, and of accelerated models over timm's."""
    rows = read_rows(RESULTS / "cpu_bfloat16.csv")
    if not rows:
        return "Not measured yet.\n"
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if row["implementation"] in ("operator", "accelerated"):
            found = cells.setdefault((row["part"], row["case"], row["dtype"]), {})
            found[row["pass"]] = f"{float(row['ratio']):.2f} x"
    passes = ("inference", "training step")
    body = ([f"`{key[0]}`", *key[1:], *(found.get(each, "") for each in passes)] for key, found in cells.items())
    table = markdown(["operator", "case", "dtype", *passes], body)
    return table + f"\nOne thread. {machines(rows)}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "symmetric_gate": lambda: calls("symmetric_gate"),
    "halo_attention_layer": lambda: calls("halo_attention", "layer"),
    "halo_attention_growth": lambda: calls("halo_attention", "growth"),
    "halo_attention_model": lambda: calls("halo_attention", "model"),
    "halo_attention_onnx": lambda: calls("halo_attention", "onnx"),
    "multi_query_pool_block": lambda: calls("multi_query_pool", "block"),
    "multi_query_pool_operator": lambda: calls("multi_query_pool", "operator"),
    "multi_query_pool_int8": lambda: calls("multi_query_pool", "int8"),
    "match_attention_operator": lambda: calls("match_attention", "operator"),
    "match_attention_block": lambda: calls("match_attention", "block"),
    "subspace_attention": lambda: calls("subspace_attention", "block"),
    "cpu_bfloat16": cpu_bfloat16,
    "kernel_resources": kernel_resources,
    "kernel_model": kernel_model,
    "gpu_checks": lambda: plain("gpu_checks"),
}
