"""A page in headless Chromium, driven by `drive.mjs`."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.demo import PAGE

WEB = PAGE.parent.parent.parent / "web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def what_is_missing() -> str | None:
    """Why the page of `visionattn demo` cannot be driven here, or None."""
    if not (PAGE / "index.html").is_file():
        return "the page is not built: make web"
    return missing_browser()


def missing_browser() -> str | None:
    """Why no page can be driven here, or None."""
    if shutil.which("node") is None or not (WEB / "node_modules/playwright-core").is_dir():
        return "Node or playwright-core is missing: make web"
    if CHROMIUM is None:
        return "Chromium is missing: make browser"
    return None


class Browser:
    """A browser with one page, in a `with` block. `browser.click(selector="...")` does an action of `drive.mjs`."""

    def __init__(self, *arguments: str) -> None:
        driver = Path(__file__).with_name("drive.mjs")
        command = ["node", str(driver), str(CHROMIUM), str(WEB / "node_modules"), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=20)

    def __getattr__(self, action: str) -> Any:
        return lambda **request: self.ask(do=action, **request)

    def ask(self, **request: Any) -> Any:
        """Send a request, and give the value of its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["value"]


def array(found: dict[str, Any]) -> np.ndarray:
    """The floats of an event."""
    return np.frombuffer(base64.b64decode(found["data"]), np.float32).reshape(found["dims"])
