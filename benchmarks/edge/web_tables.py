"""The documentation's table of the page in the browser, made of results/edge_web.csv."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows


def edge_web() -> str:
    """Ratio of both runtimes' times, one row per case, and the sizes of the downloads."""
    rows = read_rows(RESULTS / "edge_web.csv")
    if not rows:
        return "Not measured yet.\n"
    ratios = [row for row in rows if row["unit"] == "times"]
    body = [[row["case"], f"{float(row['median']):.1f}", f"{float(row['iqr']):.1f}"] for row in ratios]
    table = markdown(["model and input", "browser time / native time", "IQR"], body)
    sizes = [row for row in rows if row["unit"] == "MB"]
    return table + "".join(f"\nDownload, {row['case']}: {float(row['median']):.2f} MB.\n" for row in sizes)


TABLES: dict[str, Callable[[], str]] = {"edge_web": edge_web}
