"""`upscale`: every kind of image, exact seams, alpha without fringes."""

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import visionattn
from tests.predict.upscalers import Blur, Repeat, picture, repeated
from visionattn.errors import DataError, InputError
from visionattn.predict import upscale
from visionattn.predict.engine import TorchEngine
from visionattn.predict.restore import bleed, steps_of, tiles_of
from visionattn.predict.tiles import MIB

WEIGHTS = Path(visionattn.__file__).parents[2] / "shared" / "weights" / "span"
SPAN = WEIGHTS / "team39_spantiny_ch26_slim.pth"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("model_channels", [1, 3])
def test_arrays_keep_kind_and_channels(dtype, channels, model_channels):
    pixels = picture(6, 9, channels or 1, dtype)
    pixels = pixels[:, :, 0] if channels is None else pixels
    result = upscale(pixels, Repeat(2, model_channels))
    assert result.dtype == dtype
    # float64 passes through the weights' float32.
    np.testing.assert_allclose(result, repeated(pixels), rtol=1e-6 if np.dtype(dtype).kind == "f" else 0)


@pytest.mark.parametrize("shape", [(3, 5, 6), (2, 3, 5, 6), (1, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_keep_kind(shape, dtype):
    image = torch.rand(shape, dtype=torch.float64).to(dtype)
    result = upscale(image, Repeat(3))
    assert result.dtype == dtype
    expected = image.repeat_interleave(3, -1).repeat_interleave(3, -2)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("L", "L"), ("LA", "LA"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("P", "RGB"), ("1", "L"), ("CMYK", "RGB")],
)
def test_pil_images(mode, expected):
    image = Image.fromarray(picture()).convert(mode)
    result = upscale(image, Repeat(2))
    assert (result.mode, result.size) == (expected, (60, 40))
    np.testing.assert_array_equal(np.asarray(result), repeated(np.asarray(image.convert(expected))))


def test_pil_image_of_16_bits_and_its_profile():
    image = Image.fromarray(picture(channels=1, dtype=np.uint16)[:, :, 0])
    image.info |= {"icc_profile": b"profile", "dpi": (300, 300)}
    result = upscale(image, Repeat(2))
    assert result.mode == "I;16"
    assert result.info == {"icc_profile": b"profile", "dpi": (300, 300)}
    np.testing.assert_array_equal(np.asarray(result), repeated(np.asarray(image)))


def test_the_result_is_clamped_and_rounded_half_up():
    model = Repeat(1, 1)
    pixels = np.arange(256, dtype=np.uint8)[None]
    model.spread.weight.data *= 1.5
    expected = np.minimum(np.floor(1.5 * pixels + 0.5), 255)
    near_half = np.abs((1.5 * pixels) % 1 - 0.5) < 1e-6  # 1.5 x / 255 * 255 in float32 falls to either side
    result = upscale(pixels, model)
    assert (np.abs(result - expected)[near_half] <= 1).all()
    np.testing.assert_array_equal(result[~near_half], expected[~near_half])
    assert upscale(np.float32([[0.9]]), model) == 1.0


def test_grey_through_a_colour_model_is_the_mean():
    model = Repeat(1, 3)
    model.spread.weight.data *= torch.tensor([0.25, 0.5, 0.75]).view(3, 1, 1, 1)
    np.testing.assert_allclose(upscale(np.float32([[0.5]]), model), 0.25)


def test_tiles_are_exact_to_the_last_bit():
    """Pixels k / 128 and weights k / 64: float64 holds every sum exactly, whatever a kernel's order."""
    model = Blur(2).double()
    pixels = np.random.default_rng(0).integers(0, 129, (47, 61, 3)) / 128
    whole = upscale(pixels, model)
    assert 0 < whole.std() < 1
    memory = 600 * TorchEngine(model).bytes_per_pixel / MIB
    assert len(tiles_of(TorchEngine(model), 47, 61, None, memory)) > 4
    np.testing.assert_array_equal(upscale(pixels, model, memory=memory), whole)
    assert (upscale(pixels, model, memory=memory, overlap=2) != whole).any()


def test_tiles_in_float32_and_8_bits():
    model = Blur(2)
    pixels = picture(47, 61)
    memory = 600 * TorchEngine(model).bytes_per_pixel / MIB
    scaled = (pixels / 255).astype(np.float32)
    np.testing.assert_allclose(upscale(scaled, model, memory=memory), upscale(scaled, model), atol=1e-6)
    np.testing.assert_array_equal(upscale(pixels, model, memory=memory), upscale(pixels, model))


@pytest.mark.skipif(not SPAN.exists(), reason="needs a published weight file")
def test_tiles_of_span():
    model = visionattn.load(SPAN).double()
    pixels = np.asarray(Image.fromarray(picture(70, 90)).resize((90, 70), Image.Resampling.BICUBIC)) / 255
    whole = upscale(pixels, model)
    memory = 70 * 70 * TorchEngine(model).bytes_per_pixel / MIB
    # Kernels take sums in another order at another size, which moves the last bits.
    np.testing.assert_allclose(upscale(pixels, model, memory=memory), whole, atol=1e-12)
    assert np.abs(upscale(pixels, model, memory=memory, overlap=8) - whole).max() > 1e-8


def test_the_zoo_states_what_upscaling_needs():
    model = timm.create_model("va_span_ch26_x2").eval()
    assert upscale(picture(9, 7), model).shape == (18, 14, 3)


def test_alpha_is_apart_and_opaque_stays_opaque():
    pixels = picture(20, 20, 4)
    pixels[..., 3] = 255
    pixels[:10, :, 3] = 0
    model = Blur(2)
    result = upscale(pixels, model)
    assert (result[22:, :, 3] == 255).all()
    assert (result[:18, :, 3] == 0).all()
    opaque = pixels[..., :3].copy()
    np.testing.assert_array_equal(result[30:, :, :3], upscale(opaque, model)[30:])


def test_no_dark_fringe():
    """White beside transparent black: after upscaling, white is white up to the edge."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = 255
    model = Blur(2)
    white = upscale(np.full((16, 16, 3), 255, np.uint8), model)
    np.testing.assert_array_equal(upscale(pixels, model)[..., :3], white)


def test_bleed_takes_the_nearest_block_and_leaves_what_is_visible():
    colour = np.array([[10, 0, 0, 0, 0, 0, 0, 90]], np.uint8)[..., None]
    alpha = np.array([[9, 0, 0, 0, 0, 0, 0, 255]], np.uint8)[..., None]
    assert bleed(colour, alpha)[0, :, 0].tolist() == [10, 10, 10, 10, 90, 90, 90, 90]
    nothing = np.zeros_like(alpha)
    assert bleed(colour, nothing) is colour


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), "channels; got 5"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.full((4, 4), 200.0), "Floats must be in 0..1"),
        (np.full((4, 4), np.nan), "Floats must be in 0..1"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "must be floats"),
        (b"cat.png", "must be an array"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "32 bits"),
    ],
)
def test_images_that_are_not_taken(image, message):
    with pytest.raises(InputError, match=message):
        upscale(image, Repeat())


def test_arguments_that_are_not_taken():
    for arguments, message in [
        ({"overlap": -1}, "overlap must be at least 0 pixels; got -1"),
        ({"memory": 0}, "more than 0"),
        ({"dtype": "float8"}, "must be one of 'auto', 'float32', 'float16', 'bfloat16'; got 'float8'"),
    ]:
        with pytest.raises(InputError, match=message):
            upscale(picture(), Repeat(), **arguments)
    with pytest.raises(InputError, match="takes 4"):
        upscale(picture(), Repeat(2, 4))


def test_a_broken_network_is_named():
    model = Repeat()
    model.spread.weight.data[:] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        upscale(picture(), model)


def test_a_result_of_another_size_is_refused():
    model = Repeat(2)
    model.scale = 3
    with pytest.raises(InputError, match=r"output for \(1, 3, 20, 30\) must be \(1, 3, 60, 90\); got \(1, 3, 40, 60\)"):
        upscale(picture(), model)


def test_a_result_larger_than_the_memory_is_refused_before_it_is_computed(monkeypatch):
    monkeypatch.setattr("visionattn.predict.restore.total_memory", lambda: 7199)
    with pytest.raises(InputError, match="The result of 40 x 60 pixels takes"):
        upscale(picture(), Repeat(2))
    monkeypatch.setattr("visionattn.predict.restore.total_memory", lambda: 7200)
    assert upscale(picture(), Repeat(2)).shape == (40, 60, 3)


@pytest.mark.parametrize("memory", [float("inf"), float("nan"), 0, -1, 1e300])
def test_absurd_memory_is_refused(memory):
    with pytest.raises(InputError, match="memory must be more than 0 and at most"):
        upscale(picture(), Repeat(2), memory=memory)


def test_a_model_without_weights():
    class Nearest(torch.nn.Module):
        task, scale, in_chans, radius = "restore", 2, 3, 0

        def forward(self, x):
            return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    pixels = picture()
    np.testing.assert_array_equal(upscale(pixels, Nearest()), repeated(pixels))


def test_a_path_is_read_upright_and_gives_a_pil_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = picture(8, 12)
    Image.fromarray(pixels).save(tmp_path / "in.png", exif=exif, dpi=(300, 300))
    for path in (tmp_path / "in.png", str(tmp_path / "in.png")):
        result = upscale(path, Repeat(2))
        assert (result.mode, result.size) == ("RGB", (16, 24))
        np.testing.assert_array_equal(np.asarray(result), repeated(np.rot90(pixels, -1)))
        assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    with pytest.raises(DataError, match=r"no.*lost"):
        upscale("lost.png", Repeat(2))


def test_16_bits_of_a_path(tmp_path):
    grey = picture(channels=1, dtype=np.uint16)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(np.asarray(upscale(tmp_path / "grey.png", Repeat(2))), repeated(grey))
    pytest.importorskip("cv2").imwrite(str(tmp_path / "colour.png"), picture(dtype=np.uint16))
    with pytest.raises(InputError, match="which PIL does not support: write the result to a file"):
        upscale(tmp_path / "colour.png", Repeat(2))


def test_models_by_name_file_and_default(tmp_path):
    pixels = picture(6, 7)
    model = timm.create_model("va_span_ch26_x2", pretrained=True).eval()
    expected = upscale(pixels, model)
    np.testing.assert_array_equal(upscale(pixels, scale=2, device="cpu"), expected)
    np.testing.assert_array_equal(upscale(pixels, "va_span_ch26_x2", device="cpu"), expected)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    given = {"model": "va_span_ch26_x2", "checkpoint": tmp_path / "net.pth"}
    np.testing.assert_array_equal(upscale(pixels, **given, device="cpu"), expected)
    assert upscale(pixels, device="cpu").shape == (24, 28, 3)
    with pytest.raises(InputError, match="scale of va_span_ch26_x2 is 2, not 3"):
        upscale(pixels, "va_span_ch26_x2", scale=3)


def test_the_type_by_either_spelling():
    pixels = picture(dtype=np.float32)
    half = upscale(pixels, Blur(), dtype="bfloat16")
    assert (half != upscale(pixels, Blur())).any()
    np.testing.assert_array_equal(upscale(pixels, Blur(), dtype=torch.bfloat16), half)
    np.testing.assert_array_equal(upscale(pixels, Blur(), precision="bf16"), half)


def test_a_module_stays_as_it_is():
    model = Repeat(2).double()
    upscale(picture(), model, device="cpu", dtype="float32")
    assert model.spread.weight.dtype == torch.float64
    assert model.training
    with pytest.raises(InputError, match="The device 'toaster' cannot be used"):
        upscale(picture(), model, device="toaster")


def test_tiles_show_their_progress_in_a_session(monkeypatch):
    model, pixels, screen = Blur(layers=1), picture(40, 50, 4), io.StringIO()
    memory = 300 * TorchEngine(model).bytes_per_pixel / MIB
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr("visionattn.predict.restore.session_console", lambda: console)
    upscale(pixels, model, memory=memory)
    steps = steps_of(TorchEngine(model), pixels.shape, None, memory)
    assert steps > 10
    assert f"{steps}/{steps}" in screen.getvalue()
    screen.seek(0)
    screen.truncate()
    upscale(pixels, model)
    assert screen.getvalue() == ""


def test_long_work_may_be_given_to_a_faster_engine(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "visionattn.predict.engine.faster", lambda engine, tile: asked.append(tile.shape) or (engine, "")
    )
    monkeypatch.setattr("visionattn.predict.engine.WORTH_TIMING", 0)
    model, pixels = Repeat(2), picture(300, 200)
    memory = 9000 * TorchEngine(model).bytes_per_pixel / MIB
    for arguments in ({}, {"memory": memory, "engine": "torch"}, {"memory": memory, "dtype": "float16"}):
        upscale(pixels, model, **arguments)
    assert asked == []
    np.testing.assert_array_equal(upscale(pixels, model, memory=memory), repeated(pixels))
    assert asked == [(1, 3, 192, 192)]
