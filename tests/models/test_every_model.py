"""What networks of all families promise: derivatives of every kind that agree, and empty batches."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import visionattn

# One of each family, the smallest, and what makes it smaller still.
SMALLEST = {
    "va_cca_halonet_nano_32": {},
    "va_dcal_nano_patch4_32": {},
    "va_espan_x4": {},
    "va_halonet_nano_32": {},
    "va_match_flow_nano": {"widths": (16, 16, 16, 16), "encoder_depths": (1, 1, 1, 1), "depths": (1, 1, 0, 1)},
    "va_match_stereo_nano": {"widths": (16, 16, 16, 16), "encoder_depths": (1, 1, 1, 1), "depths": (1, 1, 0, 1)},
    "va_minimal_vit_nano_patch7_28_minimum": {},
    "va_mobilenetv2_ulsam_050_32": {},
    "va_span_ch26_x2": {},
    "va_spanf_x4": {},
    "va_spanv2_x4": {},
    "va_vit_nano_patch7_28": {"mixer": "agent", "depth": 2},
}


def build(name: str, batch: int, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network without hidden zeros, and its inputs."""
    model = timm.create_model(name, dtype=dtype, **SMALLEST[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if model.task in ("stereo", "flow"):
        return model, (torch.rand(batch, 3, 161, 161, dtype=dtype), torch.rand(batch, 3, 161, 161, dtype=dtype))
    if model.task == "restore":
        return model, (torch.rand(batch, 3, 9, 10, dtype=dtype),)
    return model, (torch.randn(batch, *model.pretrained_cfg["input_size"], dtype=dtype),)


def check_derivatives(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Compare J t in forward mode with u J in reverse mode: u (J t) = (u J) t, exactly, for parameters and inputs."""
    parameters = dict(model.named_parameters())

    def function(parameters, inputs):
        return functional_call(model, parameters, inputs)

    tangents = {key: value.abs().mean() * torch.randn_like(value) for key, value in parameters.items()}
    of_inputs = tuple(torch.randn_like(x) for x in inputs)
    with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's attentions with a forward mode
        output, tangent = jvp(function, (parameters, inputs), (tangents, of_inputs))
    leaves = [*parameters.values(), *(x.requires_grad_() for x in inputs)]
    expected = model(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, cotangent, allow_unused=True)
    pairs = zip(gradients, [*tangents.values(), *of_inputs])
    along = sum((gradient * t).sum() for gradient, t in pairs if gradient is not None)
    scale = cotangent.norm() * tangent.norm()
    assert scale > 0
    assert abs((cotangent * tangent).sum() - along) <= 1e-9 * scale


def test_every_family_is_here():
    def families(names) -> set[str]:
        return {timm.models.model_entrypoint(name).__annotations__["return"] for name in names}

    assert families(SMALLEST) == families(visionattn.models.names())


@pytest.mark.parametrize("name", SMALLEST)
def test_forward_mode_agrees_with_reverse_mode(name):
    check_derivatives(*build(name, 1 if "match" in name else 2, torch.float64))


def test_forward_mode_of_an_accelerated_model():
    model = timm.create_model("halonet26t", num_classes=3).double().eval()
    visionattn.accelerate(model)
    check_derivatives(model, (torch.randn(1, 3, 64, 64, dtype=torch.float64),))


@pytest.mark.parametrize("name", SMALLEST)
def test_gradients_of_each_image(name):
    """`vmap` of `grad` over images, as differential privacy takes them, against images one by one."""
    model, inputs = build(name, 2, torch.float64)
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def loss(parameters, *inputs):
        return functional_call(model, parameters, tuple(x.unsqueeze(0) for x in inputs)).sin().sum()

    with sdpa_kernel(SDPBackend.MATH):
        found = torch.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(inputs)))(parameters, *inputs)
    for image in range(2):
        model.zero_grad()
        model(*(x[image : image + 1] for x in inputs)).sin().sum().backward()
        expected = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
        scale = max(gradient.abs().max().item() for gradient in expected.values())
        for key, gradient in expected.items():
            torch.testing.assert_close(
                found[key][image], gradient, rtol=0, atol=1e-12 * scale, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", SMALLEST)
def test_empty_batches_give_empty_outputs(name):
    model, inputs = build(name, 0, torch.float32)
    whole = model(*build(name, 1, torch.float32)[1]).shape
    assert model(*inputs).shape == (0, *whole[1:])
