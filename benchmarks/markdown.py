"""Forms of tables that pages share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.report import RESULTS, read_rows


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table, numbers to the right of the first column."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows]) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def plain(name: str) -> str:
    """A script's CSV as it is, less the columns that say where a row comes from."""
    rows = read_rows(RESULTS / f"{name}.csv")
    if not rows:
        return "Not measured yet.\n"
    shown = [key for key in rows[0] if key not in ("torch", "triton", "git_revision", "date", "seed")]
    return markdown(shown, ([row[key] for key in shown] for row in rows))


def calls(name: str, part: str) -> str:
    """Calls of one part of a script, a table for each device."""
    rows = [row for row in read_rows(RESULTS / f"{name}.csv") if row["part"] == part]
    if not rows:
        return "Not measured yet.\n"
    memory = [key for key in ("peak_mib", "saved_mib") if any(row.get(key) for row in rows)]
    head = ["case", "dtype", "pass", "implementation", "median ms", "spread", "ratio"]
    head += [key.replace("_mib", " MiB") for key in memory]
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        found = [row for row in rows if row["device"] == device]
        body = (
            [
                *(row[key] for key in ("case", "dtype", "pass", "implementation")),
                *(row[key] and f"{float(row[key]):.2f}" for key in ("median_ms", "iqr_ms", "ratio")),
                *(row.get(key) and f"{float(row[key]):,.0f}" for key in memory),
            ]
            for row in found
        )
        threads = f"{found[0]['threads']} thread{'s' * (found[0]['threads'] != '1')}"
        tables.append(markdown(head, body) + f"\n{device}, {threads}, torch {found[0]['torch']}.\n")
    return "\n".join(tables)
