"""The page in headless Chromium, used as a person would, against ONNX Runtime."""

import gzip
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from tests.web.browser import Browser, array, what_is_missing
from visionattn.demo import PAGE, PageServer
from visionattn.export import OnnxModel

MISSING = what_is_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "nothing is missing")
# WebGPU is asked for, and software rendering is slow to read back.
ACCEPTED = ("No available adapters", "GPU stall")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
# The contrast of texts with what lies below them, by WCAG.
CONTRAST = """(() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const text = style.getPropertyValue(name).trim().replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3");
    const parts = [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16) / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pairs = [["--ink", "--paper"], ["--ink", "--card"], ["--soft", "--paper"], ["--soft", "--card"],
    ["--accent", "--paper"], ["--accent", "--card"], ["--accent", "--tint"],
    ["--on-accent", "--accent"], ["--bad", "--bad-tint"]];
  return Math.min(...pairs.map((pair) => {
    const [dark, bright] = pair.map(light).sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  }));
})()"""
# Controls without a name for a screen reader, or too small for a finger.
UNNAMED = """[...document.querySelectorAll('button, input, select, canvas, meter, progress')].filter((element) => {
  const name = element.getAttribute('aria-label') || element.labels?.[0]?.textContent || element.textContent;
  return !name?.trim() && element.getAttribute('aria-hidden') !== 'true' && !element.parentElement.ariaLabel;
}).map((element) => element.outerHTML)"""
SMALL = """[...document.querySelectorAll('main button, main label, footer select')]
  .map((element) => [element.getBoundingClientRect(), element.outerHTML])
  .filter(([box]) => box.width && (box.width < 40 || box.height < 40)).map(([, html]) => html)"""
OVERFLOW = "document.scrollingElement.scrollWidth - innerWidth"


class Served:
    """The page at an address, until it is stopped."""

    def __init__(self):
        self.server = PageServer(0)
        self.url = self.server.url
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def served():
    served = Served()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def opened(served):
    with Browser() as browser:
        browser.open(url=served.url)
        browser.select(selector="#threads", value="1")  # two would wait for each other beside other tests
        yield browser


@pytest.fixture
def browser(opened):
    """The first panel, whatever tests ran before; afterwards, nothing may have failed or come from elsewhere."""
    opened.click(selector="#tab-enlarge")
    opened.events()
    yield opened
    assert [line for line in opened.problems() if not any(part in line for part in ACCEPTED)] == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A smooth scene, twice with a shift of 6 pixels, and a small picture that still takes several tiles."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    scene = Image.fromarray(generator.integers(0, 256, (24, 40, 3), np.uint8)).resize(
        (220, 170), Image.Resampling.BICUBIC
    )
    scene.crop((6, 0, 206, 170)).save(folder / "left.png")
    scene.crop((12, 0, 212, 170)).save(folder / "right.png")
    Image.fromarray(generator.integers(0, 256, (24, 300, 3), np.uint8)).save(folder / "wide.png")
    scene.crop((0, 0, 80, 60)).save(folder / "small.png")
    scene.resize((900, 700)).save(folder / "large.png")
    Image.new("1", (17000, 10)).save(folder / "long.png")
    Image.new("1", (5000, 10)).save(folder / "broad.png")
    turned = Image.new("RGBA", (12, 8), (255, 0, 0, 0))  # transparent, and to be shown on its side
    exif = turned.getexif()
    exif[274] = 6
    turned.save(folder / "turned.png", exif=exif)
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "left.png").read_bytes()[:2000])
    return folder


def enlarge(browser, path):
    """The page's words on an enlarged photograph."""
    browser.files(selector="#enlarge input[type=file]", path=str(path))
    return browser.told(selector="#enlarge .status")


def match(browser, pictures):
    """The page's words on a matched pair."""
    browser.click(selector="#tab-depth")
    browser.files(selector="#depth .drop.left input", path=str(pictures / "left.png"))
    browser.files(selector="#depth .drop.right input", path=str(pictures / "right.png"))
    return browser.told(selector="#depth .status", pattern="Matched")


def planes(path):
    return np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)[None] / np.float32(255)


def test_a_photograph_is_enlarged_as_onnx_runtime_does(browser, pictures, tmp_path):
    told = enlarge(browser, pictures / "wide.png")
    assert told.startswith("300 × 24 to 1200 × 96 pixels in ")
    assert told.endswith(" in 2 tiles.")
    expected = OnnxModel(PAGE / "models/span_x4.onnx")(planes(pictures / "wide.png"))[0]
    found = np.full_like(expected, np.nan)
    for event in browser.events():
        rows, columns = (slice(event[name]["start"], event[name]["stop"]) for name in ("rows", "columns"))
        tile = event["tile"]
        kept = [slice(4 * tile[name]["start"], 4 * tile[name]["stop"]) for name in ("keptRows", "keptColumns")]
        found[:, :, kept[0], kept[1]] = array(event["output"])[:, :, rows, columns]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)  # sums of tiles in another order
    name = browser.download(selector="#enlarge .save", path=str(tmp_path / "saved.png"))
    assert name == "wide-x4.png"
    pixels = np.asarray(Image.open(tmp_path / "saved.png"))[:, :, :3]
    wanted = np.rint(255 * found[0].clip(0, 1)).transpose(1, 2, 0)
    assert np.abs(pixels - wanted).max() <= 1  # halves
    assert (pixels == wanted).mean() > 0.999


def test_photographs_are_upright_and_on_white(browser, pictures):
    assert enlarge(browser, pictures / "turned.png").startswith("8 × 12 to 32 × 48 pixels")
    (event,) = browser.events()
    expected = OnnxModel(PAGE / "models/span_x4.onnx")(np.ones((1, 3, 12, 8), np.float32))[0]
    np.testing.assert_allclose(array(event["output"]), expected, rtol=0, atol=1e-6)


def test_another_factor_enlarges_again(browser, pictures):
    enlarge(browser, pictures / "wide.png")
    browser.click(selector="#enlarge .choice input[value='2'] + span")
    assert "600 × 48 pixels" in browser.told(selector="#enlarge .status")
    browser.click(selector="#enlarge .choice input[value='4'] + span")
    browser.told(selector="#enlarge .status")


def test_int8_gives_nearly_the_same(browser, pictures):
    models = json.loads((PAGE / "models/models.json").read_text())
    if "models/span_x4.int8.onnx" not in [model["file"] for model in models]:
        pytest.skip("int8 gained nothing when the page was built")
    browser.click(selector="#enlarge .choice input[value=int8] + span")
    assert enlarge(browser, pictures / "small.png").startswith("80 × 60 to 320 × 240 pixels")
    expected = OnnxModel(PAGE / "models/span_x4.onnx")(planes(pictures / "small.png"))[0]
    (event,) = browser.events()
    assert 0 < np.square(array(event["output"]) - expected).mean() < 1e-4  # 40 dB
    browser.click(selector="#enlarge .choice input[value=fp32] + span")
    assert "80 × 60" in browser.told(selector="#enlarge .status")


def test_the_boundary_moves_by_keys(browser, pictures):
    enlarge(browser, pictures / "wide.png")
    clip = "document.querySelector('#enlarge .after').style.clipPath"
    before = browser.evaluate(code=clip)
    browser.press(selector="#enlarge .compare > input", key="Home")
    assert browser.evaluate(code=clip) != before
    browser.press(selector="#enlarge .compare > input", key="End")
    browser.click(selector="#enlarge .zoom")
    assert browser.evaluate(code="document.querySelector('#enlarge .after').getBoundingClientRect().width") == 1200
    browser.click(selector="#enlarge .zoom")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "notes.txt cannot be opened: it is damaged, or not an image that this browser supports. Use"),
        ("empty.png", "empty.png cannot be opened: the file is empty."),
        ("cut.png", "cut.png cannot be opened"),
        ("long.png", "long.png has 17,000 × 10 pixels; the maximum is 16,384 per side and 268 million in total:"),
        ("broad.png", "The result has 20,000 × 40 pixels; the maximum is 16,384 per side and 268 million in total:"),
    ],
)
def test_what_is_no_image_is_told(browser, pictures, name, message):
    browser.files(selector="#enlarge input[type=file]", path=str(pictures / name))
    assert browser.told(selector="#enlarge .error").startswith(message)
    assert browser.text(selector="#enlarge .status") == ""


def test_a_computation_is_cancelled_and_the_next_one_runs(browser, pictures):
    browser.files(selector="#enlarge input[type=file]", path=str(pictures / "large.png"))
    browser.told(selector="#enlarge .busy", pattern="Tile .* of ")
    browser.click(selector="#enlarge .busy button")
    assert browser.told(selector="#enlarge .status") == "Cancelled."
    assert not browser.visible(selector="#enlarge .busy")
    assert enlarge(browser, pictures / "wide.png").startswith("300 × 24")


def test_disparities_are_those_of_onnx_runtime(browser, pictures):
    assert match(browser, pictures).startswith("Matched in ")
    event = browser.events()[-1]
    views = [planes(pictures / f"{side}.png") for side in ("left", "right")]
    expected = OnnxModel(PAGE / "models/stereo.onnx")(*views)[0]
    np.testing.assert_allclose(array(event["output"]), expected, rtol=0, atol=2e-4)
    assert np.median(expected[0, 0]) == pytest.approx(6, abs=0.5)
    assert browser.text(selector="#depth .readout").startswith("Disparities up to ")
    assert _colours(browser, "#depth .colours") > 10


def test_the_second_view_is_asked_for(served, pictures):
    with Browser() as browser:
        browser.open(url=served.url)
        browser.click(selector="#tab-depth")
        browser.files(selector="#depth .drop.left input", path=str(pictures / "left.png"))
        assert browser.told(selector="#depth .status") == "Now choose the right view."


def test_the_scene_is_turned_by_keys(browser, pictures):
    match(browser, pictures)
    shown = [_picture(browser, "#depth .cloud")]
    for key in ("ArrowLeft", "+", "0"):
        browser.press(selector="#depth .cloud", key=key)
        shown.append(_picture(browser, "#depth .cloud"))
    assert len(set(shown[:3])) == 3
    assert shown[3] == shown[0]


def test_a_camera_gives_metres(browser, pictures):
    match(browser, pictures)
    browser.click(selector="#depth summary")
    browser.fill(selector="#depth [name=focal]", value="600")
    browser.fill(selector="#depth [name=baseline]", value="0.1")
    browser.press(selector="#depth [name=baseline]", key="Tab")
    assert "the nearest at" in browser.told(selector="#depth .readout", pattern="nearest")


def test_views_of_two_sizes_are_refused(browser, pictures):
    match(browser, pictures)
    browser.files(selector="#depth .drop.right input", path=str(pictures / "large.png"))
    assert browser.told(selector="#depth .error").startswith(
        "The left view has 200 × 170 pixels and the right one 900 × 700."
    )


def test_digits_are_read_with_attention(browser):
    browser.click(selector="#tab-digits")
    model = OnnxModel(PAGE / "models/digits.onnx")
    read = []
    for digit in range(10):
        browser.click(selector=f"#digits .samples button:nth-child({digit + 1})")
        told = browser.told(selector="#digits .status", pattern="reads")
        (event,) = browser.events()
        logits, attention = model(array(event["input"]))
        np.testing.assert_allclose(array(event["logits"]), logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(array(event["attention"]), attention, rtol=0, atol=1e-5)
        assert told.startswith(f"It reads {logits.argmax()}, at ")
        read.append(int(logits.argmax()))
    assert read == list(range(10))
    last = _picture(browser, "#digits .attention")
    browser.press(selector="#digits .block input", key="Home")
    assert _picture(browser, "#digits .attention") != last


def test_a_digit_is_drawn(browser):
    browser.click(selector="#tab-digits")
    browser.click(selector="#digits .clear")
    browser.draw(selector="#digits .pad", points=[[0.52, 0.15], [0.5, 0.5], [0.48, 0.85]])
    assert browser.told(selector="#digits .status", pattern="reads").startswith("It reads 1, at ")
    assert browser.events()[-1]["name"] == "digit"


def test_tabs_go_by_arrow_keys(browser):
    browser.click(selector="#tab-digits")
    browser.press(selector="#tab-digits", key="ArrowRight")
    assert browser.evaluate(code="document.activeElement.id") == "tab-enlarge"
    assert browser.visible(selector="#enlarge")
    assert not browser.visible(selector="#digits")


def test_threads_are_chosen_and_shared_memory_is_there(browser, pictures):
    assert browser.evaluate(code="crossOriginIsolated") is True
    browser.select(
        selector="#threads", value=browser.evaluate(code="document.querySelector('#threads').lastChild.value")
    )
    assert f"in WebAssembly on {min(os.cpu_count(), 8)} thread" in enlarge(browser, pictures / "wide.png")


def test_without_a_graphics_adapter_the_processor_computes(browser, pictures):
    """WebGPU is not offered then; a choice that fails falls back."""
    ask = "document.querySelector('#provider')"
    assert browser.evaluate(code=f"{ask}.options.length") == 1
    browser.evaluate(code=f"{ask}.add(new Option('graphics', 'webgpu'))")
    browser.select(selector="#provider", value="webgpu")
    assert "in WebAssembly on " in enlarge(browser, pictures / "small.png")
    browser.select(selector="#provider", value="wasm")


@pytest.mark.slow
def test_a_graphics_adapter_computes(served):
    """On the software adapter of Chromium, which takes seconds for a digit."""
    software = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    with Browser(*software) as browser:
        browser.open(url=served.url)
        browser.select(selector="#provider", value="webgpu")
        browser.click(selector="#tab-digits")
        browser.click(selector="#digits .samples button:nth-child(4)")
        told = browser.told(selector="#digits .status", pattern="reads", timeout=120_000)
        (event,) = browser.events()
    assert told.endswith("on the graphics card (WebGPU).")
    logits, attention = OnnxModel(PAGE / "models/digits.onnx")(array(event["input"]))
    np.testing.assert_allclose(array(event["logits"]), logits, rtol=0, atol=1e-3)
    np.testing.assert_allclose(array(event["attention"]), attention, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_can_be_read(served, size, dark):
    width, height = SIZES[size]
    with Browser() as browser:
        browser.open(url=served.url, width=width, height=height, dark=dark)
        assert browser.evaluate(code=CONTRAST) >= 4.5
        for tab in ("enlarge", "depth", "digits"):
            browser.click(selector=f"#tab-{tab}")
            assert browser.evaluate(code=OVERFLOW) <= 0
            assert browser.evaluate(code=SMALL) == []
        assert browser.evaluate(code=UNNAMED) == []


def test_it_works_without_a_network_and_is_small(pictures):
    served = Served()
    try:
        with Browser() as browser:
            browser.open(url=served.url)
            enlarge(browser, pictures / "wide.png")
            assert browser.told(selector="#offline").startswith("Stored in this browser")
            loaded = {url.split("?")[0].removeprefix(served.url) or "index.html" for url in browser.requests()}
            served.stop()
            browser.load(url=served.url)
            assert enlarge(browser, pictures / "wide.png").startswith("300 × 24")
            browser.click(selector="#tab-digits")
            browser.click(selector="#digits .samples button:nth-child(4)")
            assert browser.told(selector="#digits .status", pattern="reads")
    finally:
        if served.thread.is_alive():
            served.stop()
    assert {"runtime/ort-wasm-simd-threaded.wasm", "models/span_x4.onnx"} <= loaded
    assert sum(len(gzip.compress((PAGE / name).read_bytes(), 6)) for name in loaded) < 7e6


def _picture(browser, selector):
    """What a canvas shows, after the next frame."""
    frame = "await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);"
    code = f"(async () => {{ {frame} return document.querySelector('{selector}').toDataURL(); }})()"
    return browser.evaluate(code=code)


def _colours(browser, selector):
    code = f"""(() => {{
      const canvas = document.querySelector('{selector}');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      return new Set(new Uint32Array(data.buffer)).size;
    }})()"""
    return browser.evaluate(code=code)
