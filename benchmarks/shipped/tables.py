"""The documentation's table of shipped weights and their baselines."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import machines, markdown
from benchmarks.report import RESULTS, read_rows
from benchmarks.shipped.measures import LOWER
from visionattn.weights import SHIPPED


def shipped_weights() -> str:
    """A row for each shipped weight file, data and metric: its numbers, and the baselines'; the best is bold."""
    rows = read_rows(RESULTS / "shipped_weights.csv")
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["weights"], row["data"], row["metric"])
        groups.setdefault(key, {})[row["method"]] = row["value"]
    body = []
    for (weights, data, metric), values in sorted(groups.items()):
        best = (min if metric in LOWER else max)(values, key=lambda method: float(values[method]))
        cells = {method: f"{float(value):.2f}" for method, value in values.items()}
        cells[best] = f"**{cells[best]}**"
        own = [method for method in cells if method.startswith(weights)]
        shipped = ", ".join(cells[method] + _setting(method.removeprefix(weights)) for method in own)
        baselines = ", ".join(f"{method} {cells[method]}" for method in cells if method not in own)
        body.append([f"`{weights}`", data, metric, shipped, baselines])
    measured = {row["weights"] for row in rows}
    left_out = [file.stem for file in sorted(SHIPPED.glob("*.safetensors")) if file.stem not in measured]
    table = markdown(["weights", "data", "metric", "shipped", "baselines"], body) if body else ""
    origin = f"\n{machines(rows)}.\n" if rows else ""
    missing = f"\nNot measured yet: {', '.join(f'`{name}`' for name in left_out)}.\n" if left_out else ""
    return (table + origin + missing).lstrip("\n")


def _setting(options: str) -> str:
    """Options of a use of the weights, in parentheses; nothing for the plain use."""
    return f" (`{options.strip()}`)" if options else ""


TABLES: dict[str, Callable[[], str]] = {"shipped_weights": shipped_weights}
