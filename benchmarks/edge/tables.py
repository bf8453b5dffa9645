"""The documentation's tables of edge devices."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import machines, markdown
from benchmarks.report import RESULTS, read_rows

# What the page in the browser calls a network (`benchmarks.edge.web`).
PAGE_NAMES = {
    "va_minimal_vit_nano_patch7_28": "digits",
    "va_span_ch26_x4": "span_x4",
    "va_match_stereo_nano": "stereo",
}


def runtimes() -> str:
    """How far each network comes in each runtime, with its error and its speed against ONNX Runtime."""
    rows = read_rows(RESULTS / "runtimes.csv")
    if not rows:
        return "Not measured yet.\n"
    cells = {(row["runtime"], row["model"]): row for row in rows}
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    models = {row["model"]: row for row in rows}
    body = [
        [f"`{model}`, {row['input']}, {row['weights']}", *(_cell(cells.get((name, model))) for name in names)]
        for model, row in models.items()
    ]
    versions = "; ".join(_versions(name, rows) for name in names)
    origin = f"One thread. {machines(rows)}. {versions}."
    return markdown(["model, size, weights", *names], body) + f"\n{origin}\n\n" + _failures(rows)


def edge() -> str:
    """Size, memory and time of our networks, each above its peers."""
    rows = read_rows(RESULTS / "edge.csv")
    if not rows:
        return "Not measured yet.\n"
    head = ["network", "image", "parameters", "file", "accuracy", "1 thread"]
    head += ["our time / peer's, 1 thread", "2 threads"]
    head += ["memory", "WASM"]
    body = []
    for row in rows:
        ours = row["model"] == row["compared_with"]
        time = f"{float(row['median_ms_1']):.1f} ± {float(row['iqr_ms_1']):.1f} ms"
        ratios = ["" if ours else f"{float(row[f'ratio_{threads}']):.2f} x" for threads in (1, 2)]
        size = f"{int(row['bytes']) / 1e6:.2f} MB"
        name = f"**`{row['model']}`**" if ours else f"{row['model']}"
        facts = [f"{int(row['parameters']):,}", size, row["accuracy"], time, *ratios, f"{row['peak_mib']} MiB"]
        facts.append(_in_browser(row) if ours else "")
        body.append([name, row["input"], *facts])
    origin = f"{machines(rows)}; ONNX Runtime {rows[-1]['onnxruntime']}."
    return markdown(head, body) + f"\n{origin}\n"


def _in_browser(row: dict[str, str]) -> str:
    """The time in WebAssembly, where the page's benchmark has the network at this size."""
    case = f"{PAGE_NAMES.get(row['model'])} {row['input'].replace('x', ' x ')}"
    found = [
        web for web in read_rows(RESULTS / "edge_web.csv") if (web["case"], web["measure"]) == (case, "WebAssembly")
    ]
    return f"{float(found[-1]['median']):.1f} ms" if found else ""


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    if row["status"] in ("fails", "wrong"):
        return row["status"]
    if row["status"] == "converted":
        return f"converts, {int(row['bytes']) / 1e6:.2f} MB"
    speed = f", {float(row['ratio']):.2f} x" if row["ratio"] else ""
    return f"{row['error_float32']}{speed}, {int(row['bytes']) / 1e6:.2f} MB"


def _versions(name: str, rows: list[dict[str, str]]) -> str:
    return next((row["versions"] for row in rows if row["runtime"] == name and row["versions"]), name)


def _failures(rows: list[dict[str, str]]) -> str:
    """A line for each network that a runtime does not take, with the runtime's reason."""
    failed = [row for row in rows if row["status"] in ("fails", "wrong")]
    return "".join(f"- {row['runtime']}, `{row['model']}`, {_reason(row)}\n" for row in failed)


def _reason(row: dict[str, str]) -> str:
    if row["status"] == "wrong":
        error = "NaN" if row["error_float32"] == "nan" else row["error_float32"]
        return f"wrong: its error is {error}, the largest output {row['largest_output']}."
    reason = row["reason"].rstrip(".").replace("|", "/")
    return f"fails in {row['step']}: `{reason}`."


TABLES: dict[str, Callable[[], str]] = {"runtimes": runtimes, "edge": edge}
