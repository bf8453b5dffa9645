"""Forms of tables that pages share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.report import RESULTS, read_rows

PROVENANCE = ("device", "threads", "torch", "triton", "git_revision", "date", "seed")
TITLES = {
    "median_ms": "median ms",
    "iqr_ms": "IQR ms",
    "peak_mib": "peak MiB",
    "size_mib": "size MiB",
    "mega_macs": "MACs (M)",
    "macs": "MACs",
    "recall_at_10": "recall@10",
    "psnr_y": "PSNR dB (Y)",
    "ssim_y": "SSIM (Y)",
    "macs_256x256": "MACs at 256 x 256",
    "epe": "EPE px",
    "bad_0_5": "bad-0.5 %",
    "bad_1": "bad-1 %",
    "bad_2": "bad-2 %",
    "bad_4": "bad-4 %",
    "d1": "D1 %",
    "density": "density %",
}


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table. Columns of numbers are aligned right, columns of text left."""
    rows = list(rows)
    columns = [[row[column] for row in rows] for column in range(len(head))]
    rule = ["---:" if column and all(map(_is_number, cells)) else "---" for column, cells in enumerate(columns)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows]) + "\n"


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("*+-–<")[:1] in ("", *"0123456789")


def machines(rows: Iterable[dict[str, str]]) -> str:
    """Devices and versions of PyTorch that rows were measured with."""
    return "; ".join(sorted({f"{row['device']}, torch {row['torch']}" for row in rows}))


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def plain(name: str, **own: str) -> str:
    """A script's CSV with readable titles, `own` before `TITLES`; what all rows have in common stands below."""
    rows = read_rows(RESULTS / f"{name}.csv")
    if not rows:
        return "Not measured yet.\n"
    fixed = [key for key in rows[0] if len(rows) > 1 and len({row[key] for row in rows}) == 1]
    kept = [key for key in PROVENANCE[:2] if key in rows[0] and key not in fixed]
    shown = [key for key in rows[0] if key not in fixed and (key not in PROVENANCE or key in kept)]
    titles = TITLES | own
    head = [titles.get(key, key.replace("_", " ")) for key in shown]
    table = markdown(head, ([_value(key, row[key]) for key in shown] for row in rows))
    first = rows[0]
    same = [f"{titles.get(key, key.replace('_', ' '))} {first[key]}" for key in fixed if key not in PROVENANCE]
    origin = _origin(first, [key for key in PROVENANCE[:2] if key in first and key not in kept])
    return table + f"\n{'; '.join([origin, ', '.join(same)] if same else [origin])}.\n"


def _value(key: str, cell: str) -> str:
    """A cell as it is read: three digits of a time, thousands separated."""
    if key in ("median_ms", "iqr_ms"):
        return f"{float(cell):,.0f}" if float(cell) >= 100 else f"{float(cell):.3g}"
    return f"{int(cell):,}" if cell.isdigit() else cell


def _origin(row: dict[str, str], keys: list[str]) -> str:
    """Device, threads and version of PyTorch of a table's rows, without a full stop."""
    words = [row["device"]] if "device" in keys else []
    if "threads" in keys:
        words.append(f"{row['threads']} thread{'s' * (row['threads'] != '1')}")
    return ", ".join([*words, f"torch {row['torch']}"])


def calls(name: str, part: str | None = None) -> str:
    """Calls of a script, or of one part: a table per device, a row per case, a column per implementation.

    The baseline's cells have its time, the others their speed-up over it; both have peak memory.
    """
    rows = [row for row in read_rows(RESULTS / f"{name}.csv") if part is None or row["part"] == part]
    if not rows:
        return "Not measured yet.\n"
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        found = [row for row in rows if row["device"] == device]
        cases: dict[tuple[str, ...], dict[str, str]] = {}
        for row in found:
            key = (row["case"], row["dtype"], row["pass"])
            cases.setdefault(key, {})[row["implementation"]] = _call(row)
        names = dict.fromkeys(row["implementation"] for row in found)
        dtypes = len({row["dtype"] for row in found}) > 1
        head = ["case", *(["dtype"] if dtypes else []), "pass", *names]
        body = (
            [*(key if dtypes else (key[0], key[2])), *(cells.get(each, "") for each in names)]
            for key, cells in cases.items()
        )
        origin = _origin(found[0], ["device", "threads"])
        dtype = "" if dtypes else f", {found[0]['dtype']}"
        tables.append(markdown(head, body) + f"\n{origin}{dtype}.\n")
    return "\n".join(tables)


def _call(row: dict[str, str]) -> str:
    """Speed-up, or the time of the baseline, and peak memory of a call."""
    memory = row.get("peak_mib") and f"{float(row['peak_mib']):,.0f} MiB"
    time = row["median_ms"] and f"{_value('median_ms', row['median_ms'])} ms"
    if row["ratio"] and float(row["ratio"]) != 1:
        time = f"{float(row['ratio']):.2f} x"
    return ", ".join(filter(None, [time, memory]))
