"""The built documentation: links and anchors, equations, and its pages in headless Chromium at two widths."""

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import plots
from tests.web.browser import Browser, missing_browser

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml")
PAGES = ("index.html", "how-to/upscale.html", "reference/blocks.html", "results/index.html")
WIDTHS = (1280, 390)
# Code outside of the window, or that is cut off and cannot be scrolled; pixels of rounding are let pass.
CUT = """[...document.querySelectorAll('article pre > code')].filter((code) => {
  const box = code.getBoundingClientRect();
  const scrolls = ['auto', 'scroll'].includes(getComputedStyle(code).overflowX);
  return box.width && (box.right > innerWidth + 1 || (code.scrollWidth > code.clientWidth + 1 && !scrolls));
}).map((code) => code.textContent.slice(0, 80))"""
WIDER = "document.scrollingElement.scrollWidth - innerWidth"
HEADINGS = "[...document.querySelectorAll('article :is(h1, h2, h3, h4, h5, h6)')].map((found) => +found.tagName[1])"
WITHOUT_TEXT = "[...document.querySelectorAll('article img')].filter((image) => !image.alt).map((image) => image.src)"
# The lowest contrast of the article's texts with what lies below them, by WCAG.
CONTRAST = """(() => {
  const parts = (colour) => { const [r, g, b, a = 1] = colour.match(/[0-9.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, below) => [0, 1, 2].map((at) => top[3] * top[at] + (1 - top[3]) * below[at]);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const below = (element) => {
    const colour = parts(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 || element === document.body ? colour : over(colour, below(element.parentElement));
  };
  const texts = [...document.querySelectorAll('article :is(h1, h2, h3, p, li, td, th, a, code, span)')].filter(
    (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()) &&
      element.offsetWidth && !element.matches('.headerlink, .md-clipboard, .md-clipboard *'));
  return texts.map((element) => {
    const ground = below(element);
    const pair = [light(over(parts(getComputedStyle(element).color), ground)), light(ground)].sort((a, b) => a - b);
    return [(pair[1] + 0.05) / (pair[0] + 0.05), element.textContent.slice(0, 40)];
  }).sort((a, b) => a[0] - b[0])[0];
})()"""
BROKEN = "[...document.querySelectorAll('article img')].filter((image) => !image.naturalWidth).map((one) => one.src)"


def missing() -> list[str]:
    """Packages of the documentation that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site; building is strict, so that broken links and anchors fail."""
    if missing():
        pytest.skip(f"{', '.join(missing())} are not installed: make docs")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return output


@pytest.fixture(scope="session")
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_equations_are_mathml(site):
    for path in site.rglob("*.html"):
        assert 'class="arithmatex"' not in path.read_text(), path
    page = (site / "reference" / "blocks.html").read_text()
    assert page.count("<math") >= 10


def test_links_lead_somewhere(site):
    """Links and anchors within the site, also those that the reference makes of names."""
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', page)) for path, page in pages.items()}
    dead = []
    for path, page in pages.items():
        for link in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]+)"', page):
            if re.match(r"[a-z]+:|//", link):
                continue
            target, _, anchor = link.partition("#")
            found = (path.parent / target).resolve() if target else path
            if found.is_dir():
                found /= "index.html"
            if not found.is_file() or (anchor and found in anchors and anchor not in anchors[found] | {"__top"}):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead


@pytest.mark.skipif(missing_browser() is not None, reason=missing_browser() or "nothing is missing")
def test_pages_in_a_browser(served):
    with Browser() as browser:
        for width in WIDTHS:
            for page in PAGES:
                browser.visit(url=f"{served}/{page}", width=width)
                where = f"{page} at {width} pixels"
                assert browser.problems() == [], where
                assert browser.evaluate(code=CUT) == [], where
                assert browser.evaluate(code=WIDER) <= 0, where
                assert browser.evaluate(code=WITHOUT_TEXT) == [], where
                assert browser.evaluate(code=BROKEN) == [], where
                levels = browser.evaluate(code=HEADINGS)
                assert levels.count(1) == 1, where
                assert all(after <= before + 1 for before, after in pairwise(levels)), where
            for dark in (False, True):
                browser.visit(url=f"{served}/reference/search.html", width=width, dark=dark)
                lowest, text = browser.evaluate(code=CONTRAST)
                assert lowest >= 4.5, text


@pytest.mark.parametrize("name", sorted(plots.ALL))
def test_plots_are_of_the_rows(name):
    assert f"<dc:title>{plots.digest(name)}</dc:title>" in (plots.PLOTS / f"{name}.svg").read_text()


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs/blocks").glob("*.md")), ROOT / "docs/mixers.md"], ids=lambda p: p.stem
)
def test_explanations_have_a_figure(page):
    """Drawn by tools/explanation_figures.py: small, and with a text that says what it shows."""
    found = re.findall(r"!\[([^\]]{60,})\]\((\S+\.svg)\)", page.read_text())
    assert [name for _, name in found] == [f"{page.stem}.svg"]
    assert (page.parent / found[0][1]).stat().st_size <= 40_000
