"""Models of the page in Chromium against ONNX Runtime on the same processor, and what a visitor downloads.

    python -m benchmarks.edge.web          # needs the built page (make web) and Chromium (make browser)

Both compute on one thread, in turn, round after round; the browser's worker is the page's own. A ratio is that of one
round, its median is given. Downloads are the files that the page loads to enlarge a photograph, each through gzip.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.report import RESULTS, environment, write_rows
from tests.web.browser import WEB, Browser, what_is_missing
from visionattn.demo import PAGE, PageServer

CASES = {
    "digits": [(28, 28)],
    "span_x4": [(64, 64), (180, 240)],
    "span_x4.int8": [(64, 64), (180, 240)],
    "stereo": [(192, 256), (288, 384)],
}
ROUNDS, WARM_UP = 15, 2
# One worker for all calls; inputs are random, since times do not depend on them.
WORKER = """(() => {
  const worker = new Worker("%s", { type: "module" });
  let count = 0;
  window.measure = (model, height, width) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => {
      if (data.kind === "result") resolve(data.milliseconds);
      if (data.kind === "failure") reject(new Error(data.message));
    };
    const [channels] = model.input_size;
    const inputs = Object.fromEntries(model.input_names.map((name) => [name, {
      data: Float32Array.from({ length: channels * height * width }, Math.random),
      dims: [1, channels, height, width],
    }]));
    worker.postMessage({
      id: ++count, url: new URL(model.file, document.baseURI).href, bytes: model.bytes, inputs, provider: "wasm",
      weights: model.weights && new URL(model.weights, document.baseURI).href,
      threads: 1, runtime: new URL("runtime/", document.baseURI).href,
    });
  });
})()"""


def native(model: dict[str, Any], size: tuple[int, int]) -> Callable[[], float]:
    """A function that gives the milliseconds of one call on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(PAGE / model["file"], options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).random((1, model["input_size"][0], *size), np.float32)
    feeds = dict.fromkeys(model["input_names"], images)

    def run() -> float:
        start = time.perf_counter()
        session.run(None, feeds)
        return 1e3 * (time.perf_counter() - start)

    return run


def timings(browser: Browser, models: dict[str, Any], columns: dict[str, str]) -> list[dict[str, str]]:
    rows = []
    for name, sizes in CASES.items():
        if name not in models:
            continue  # int8 that gains nothing is not part of the page
        for size in sizes:
            model, run = models[name], native(models[name], size)
            code = f"measure({json.dumps(model)}, {size[0]}, {size[1]})"
            pairs = [(run(), browser.evaluate(code=code)) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
            here, there = zip(*pairs)
            measured = {
                "native": ("ms", here),
                "WebAssembly": ("ms", there),
                "WebAssembly / native": ("times", [slow / fast for fast, slow in pairs]),
            }
            for what, (unit, values) in measured.items():
                low, middle, high = statistics.quantiles(values, n=4)
                case = f"{name} {size[0]} x {size[1]}"
                found = {
                    "case": case,
                    "measure": what,
                    "unit": unit,
                    "median": f"{middle:.3f}",
                    "iqr": f"{high - low:.3f}",
                }
                rows.append(found | columns)
                print(case, what, f"{middle:.2f} {unit}, IQR {high - low:.2f}")
    return rows


def download(browser: Browser, url: str, columns: dict[str, str]) -> list[dict[str, str]]:
    """What the page loads until a photograph is enlarged, and what its service worker keeps; without the examples."""
    browser.open(url=url)
    browser.click(selector="#enlarge .example")
    browser.told(selector="#enlarge .status", timeout=120_000)
    names = {address.split("?")[0].removeprefix(url) or "index.html" for address in browser.requests()}
    kept = re.search(r"\[[^\]]*models\.json[^\]]*\]", (PAGE / "offline.js").read_text())
    assert kept is not None
    whole = {name if name != "./" else "index.html" for name in json.loads(kept[0])}
    rows = []
    for case, files in {"page with span_x4": names, "all that is kept for work without a network": whole}.items():
        sizes = [len(gzip.compress((PAGE / name).read_bytes(), 6)) for name in files if not name.startswith("examples")]
        total = sum(sizes) / 1e6
        print(f"{case}: {len(sizes)} files, {total:.3f} MB through gzip")
        row = {"case": case, "measure": "download, gzip", "unit": "MB", "median": f"{total:.3f}", "iqr": ""}
        rows.append(row | columns)
    return rows


def main() -> None:
    missing = what_is_missing()
    if missing:
        raise SystemExit(missing)
    lock = json.loads((WEB / "package-lock.json").read_text())["packages"]
    columns = {
        "threads": "1",
        "onnxruntime": version("onnxruntime"),
        "onnxruntime_web": lock["node_modules/onnxruntime-web"]["version"],
        **environment("cpu"),
    }
    listed = json.loads((PAGE / "models/models.json").read_text())
    models = {model["file"].removeprefix("models/").removesuffix(".onnx"): model for model in listed}
    (worker,) = (PAGE / "assets").glob("worker-*.js")
    with PageServer(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Browser() as browser:
            browser.open(url=server.url)
            columns["browser"] = f"Chromium {browser.version()}"
            rows = download(browser, server.url, columns)
            browser.evaluate(code=WORKER % f"assets/{worker.name}")
            rows += timings(browser, models, columns)
        server.shutdown()
    write_rows(RESULTS / "edge_web.csv", rows)


if __name__ == "__main__":
    main()
