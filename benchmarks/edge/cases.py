"""The networks that the benchmarks of edge devices run, and how each is written for a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import visionattn  # noqa: F401  registers the names
from visionattn.export.api import draw_random_weights

SEED = 0


@dataclass(frozen=True)
class Case:
    """A network at a size.

    Args:
        name: Its name in timm's registry.
        size: Height and width of its images.
        pretrained: Whether weights ship with the package; random ones are drawn otherwise.
        inputs: The names of its inputs.
    """

    name: str
    size: tuple[int, int]
    pretrained: bool = False
    inputs: tuple[str, ...] = ("image",)

    def network(self) -> nn.Module:
        """The network in eval mode, the same in every process."""
        torch.manual_seed(SEED)
        model = timm.create_model(self.name, pretrained=self.pretrained).eval().requires_grad_(False)
        if not self.pretrained:
            draw_random_weights(model, self.size)
        return model

    def images(self) -> tuple[Tensor, ...]:
        """One image, or two views of a smooth image, 9 pixels apart."""
        generator = torch.Generator().manual_seed(SEED)
        height, width = self.size
        if len(self.inputs) == 1:
            channels = timm.get_pretrained_cfg(self.name).input_size[0]
            return (torch.rand(1, channels, height, width, generator=generator),)
        coarse = torch.rand(1, 3, height // 4, width // 4 + 4, generator=generator)
        picture = interpolate(coarse, size=(height, width + 16), mode="bicubic").clamp(0, 1)
        return picture[..., :width].contiguous(), picture[..., 9 : 9 + width].contiguous()


CASES = {
    "span_ch26_x4": Case("va_span_ch26_x4", (180, 240), pretrained=True),
    "minimal_vit_micro": Case("va_minimal_vit_micro_patch4_32", (32, 32), pretrained=True),
    "digits": Case("va_minimal_vit_nano_patch7_28", (28, 28)),
    "ulsam": Case("va_mobilenetv2_ulsam_100", (224, 224)),
    "halonet_nano": Case("va_halonet_nano_32", (32, 32)),
    "match_stereo_nano": Case("va_match_stereo_nano", (192, 256), pretrained=True, inputs=("left", "right")),
}


def write_case(case: Case, folder: Path) -> None:
    """Write `model.onnx` of fixed batch and size, `inputs.npz`, and `expected.npz` in float32 and float64."""
    from visionattn.export import export_onnx

    model, images = case.network(), case.images()
    export_onnx(model, folder / "model.onnx", input_size=case.size, dynamic_size=False, batch=1, check=False)
    named = zip(case.inputs, images, strict=True)
    np.savez(folder / "inputs.npz", **{name: image.numpy() for name, image in named})
    single = model(*images).numpy()
    double = model.double()(*[image.double() for image in images]).numpy()
    np.savez(folder / "expected.npz", float32=single, float64=double)
