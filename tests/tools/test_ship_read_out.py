"""A head of probing and the read-out made of it compute the same."""

import timm
import torch

import visionattn  # noqa: F401  registers the models
from tools.ship_read_out import NAME, read_out
from visionattn.probe.heads.banks import HeadSpec, create_head
from visionattn.probe.tokens.interface import Layer


def test_batch_norm_is_folded():
    head = create_head(HeadSpec("ep_32"), Layer("last", 96, (8, 8), True), 10).double()
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.1, 3)
    torch.nn.init.normal_(head.classifier.weight)
    network = timm.create_model(NAME).double().eval()
    network.load_state_dict({**network.state_dict(), **read_out(head)})
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    expected = head.eval()(network.forward_features(images)[:, 1:])
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)
