"""What the page loads: the network that also gives its attention, and the weights that read digits."""

import json

import numpy as np
import pytest
import torch

from tests.web.browser import WEB
from visionattn.demo import DIGITS
from visionattn.opening import open_model

page_models = pytest.importorskip("tools.page_models", reason="needs scikit-image")


@pytest.fixture(scope="module")
def network():
    return open_model("va_minimal_vit_nano_patch7_28", DIGITS).model.eval()


@pytest.fixture(scope="module")
def digits(network):
    """The page's examples, prepared as the metadata say, (10, 1, 28, 28)."""
    strip = np.asarray(page_models.digit_strip(), np.float32) / 255
    images = torch.from_numpy(strip.reshape(28, 10, 28).transpose(1, 0, 2)[:, None])
    return (images - network.pretrained_cfg["mean"][0]) / network.pretrained_cfg["std"][0]


@torch.no_grad()
def test_the_shipped_weights_read_the_examples(network, digits):
    assert network(digits).argmax(1).tolist() == list(range(10))


@torch.no_grad()
def test_attention_is_a_second_output(network, digits):
    logits, attention = page_models.WithAttention(network)(digits)
    torch.testing.assert_close(logits, network(digits))
    assert attention.shape == (10, 6, 4, 4)
    seen = []
    block = network.blocks[2].attn
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(digits)
    hook.remove()
    weights = block.attention_weights(seen[0]).mean(dim=1)  # of the heads
    torch.testing.assert_close(attention[:, 2].flatten(1), weights[:, 0, 1:])


def test_every_version_is_pinned_and_no_registry_is_named():
    text = (WEB / "package-lock.json").read_text()
    assert "resolved" not in text
    wanted = json.loads((WEB / "package.json").read_text())
    locked = json.loads(text)["packages"]
    for name, version in (wanted["dependencies"] | wanted["devDependencies"]).items():
        assert locked[f"node_modules/{name}"]["version"] == version
