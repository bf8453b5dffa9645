"""Networks of equal size, images of a folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.arena import accuracy
from visionattn.arena.nets import create_mixer
from visionattn.arena.plan import Plan
from visionattn.cost import count_parameters
from visionattn.errors import DataError
from visionattn.mixers import MIXERS

SIZE = accuracy.SMALL_SIZE


def network(name, equal):
    return accuracy.Network(name, 1, 10, SIZE, accuracy.mlp_width(name, SIZE, equal))


@pytest.mark.parametrize("name", MIXERS)
def test_equal_parameters_and_macs(name):
    softmax = count_parameters(network("softmax", "parameters"))
    assert count_parameters(network(name, "parameters")) == pytest.approx(softmax, abs=SIZE.depth * SIZE.dim * 2)

    def macs(kind):
        width = accuracy.mlp_width(kind, SIZE, "MACs")
        return (
            create_mixer(kind, SIZE.dim, SIZE.heads, accuracy.GRID, device="meta").macs(64) + 2 * 64 * SIZE.dim * width
        )

    if accuracy.mlp_width(name, SIZE, "MACs") > 1:
        assert macs(name) == pytest.approx(macs("softmax"), rel=0.01)


def test_patches_are_in_order():
    images = np.arange(16 * 16 * 2, dtype=np.uint8).reshape(1, 16, 16, 2)
    cut = accuracy.patches(images)
    assert cut.shape == (1, 64, 8)
    expected = images[0, 2:4, 4:6].reshape(-1) / 127.5 - 1
    np.testing.assert_allclose(cut[0, 8 + 2], expected, rtol=1e-6)


def test_digits_are_learned():
    found = {entry[:2]: entry.value for entry in accuracy.run("softmax", 0, Plan(epochs=2), torch.device("cpu"))}
    assert found["MLP width", "equal MACs"] == found["MLP width", "equal parameters"] == 128
    assert found["accuracy", "equal MACs"] == found["accuracy", "equal parameters"] > 0.15


def test_static_maps_are_those_of_the_first_layer():
    net = network("static_qk", "parameters").eval()
    x = torch.randn(2, 64, 1)
    net(x)
    first, second = net.blocks[0].mixer.source, net.blocks[1].mixer.source
    assert first is second
    torch.testing.assert_close(first, net.blocks[0].norm1(net.embedding(x) + net.position))


def folder(tmp_path, size=(16, 16), test="test", classes=("a", "b")):
    rng = np.random.default_rng(0)
    for part in ("train", test):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_a_folder_of_images(tmp_path):
    images = accuracy.read_folder(folder(tmp_path, test="val"))
    assert images.train.shape == (6, 64, 12)
    assert images.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.classes == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "test").rename(place / "rest"), "must contain the folders train and test"),
        (lambda place: (place / "test" / "b").rename(place / "test" / "c"), "classes of .* differ"),
        (lambda place: Image.new("RGB", (20, 20)).save(place / "train" / "a" / "9.png"), "found 16 x 16, 20 x 20"),
        (lambda place: (place / "train" / "a" / "9.png").write_text("no"), None),
    ],
)
def test_folders_that_do_not_fit(tmp_path, change, message):
    change(folder(tmp_path))
    if message is None:
        assert len(accuracy.read_folder(tmp_path).train) == 6  # a few damaged files are left out
        return
    with pytest.raises(DataError, match=message):
        accuracy.read_folder(tmp_path)
