"""The documentation's table of the page in the browser, made of results/edge_web.csv."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows


def edge_web() -> str:
    """Times of both runtimes and their ratio, a row a case; last what is downloaded."""
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in read_rows(RESULTS / "edge_web.csv"):
        cases.setdefault(row["case"], {})[row["measure"]] = row
    body = []
    for case, measures in cases.items():
        if "native" in measures:
            shown = [measures[name] for name in ("native", "WebAssembly", "WebAssembly / native")]
            body.append([case, *[f"{float(row['median']):.1f} ± {float(row['iqr']):.1f}" for row in shown]])
    sizes = [row for measures in cases.values() for row in measures.values() if row["unit"] == "MB"]
    table = markdown(["model and input", "ONNX Runtime, ms", "in the browser, ms", "times as long"], body)
    return table + "".join(f"\nDownload, {row['case']}: {float(row['median']):.2f} MB.\n" for row in sizes)


TABLES: dict[str, Callable[[], str]] = {"edge_web": edge_web}
