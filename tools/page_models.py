"""Write the data of the page of `visionattn demo`: models as checked ONNX files, and example images.

    python -m tools.page_models web/public

`models/models.json` lists the files with their metadata. Weights and photographs are those of installed packages.
Graphs read the weights of this package from copies of its files; a wheel contains each of them once.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

from tools.external_weights import refer_to_weights
from tools.written_digits import digit_strip
from visionattn.checkpoints import create_pretrained
from visionattn.demo import DIGITS
from visionattn.demo.server import WEIGHTS
from visionattn.export import export_onnx
from visionattn.export.half import halve_weights
from visionattn.export.onnx import OnnxFile
from visionattn.export.variants import Variant, write_variants
from visionattn.opening import open_model

MODELS = {"span_x2": "va_span_ch26_x2", "span_x4": "va_span_ch26_x4", "stereo": "va_match_stereo_nano"}
KEPT = (
    "input_names",
    "input_size",
    "labels",
    "mean",
    "model",
    "output_names",
    "radius",
    "scale",
    "size_minimum",
    "std",
    "task",
)
SMALL = 2  # factor by which the example image for upscaling is reduced


class WithAttention(nn.Module):
    """A minimal transformer that also returns the attention of the class token in each block.

    Shape:
        (B, C, H, W) -> logits (B, classes), attention (B, blocks, h, w): mean of the heads, for the h x w patches.
    """

    output_names = ("logits", "attention")

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.pretrained_cfg = network.pretrained_cfg
        self.num_classes = network.num_classes

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.network._pos_embed(self.network.patch_embed(images))
        maps = []
        for block in self.network.blocks:
            maps.append(block.attn.attention_weights(block.norm1(x)).mean(dim=1)[:, 0, 1:])
            x = block(x)
        logits = self.network.forward_head(self.network.norm(x))
        return logits, torch.stack(maps, dim=1).unflatten(2, self.network.patch_embed.grid_size)


def write_models(folder: Path) -> None:
    """Write the files, and then their list, whose presence shows that all files exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models.json").unlink(missing_ok=True)
    entries = []
    for file, name in MODELS.items():
        written = export_onnx(create_pretrained(name), folder / f"{file}.onnx", weights="shipped with visionattn")
        found = write_variants(written.path, int8=True, overwrite=True) if written.spec.task == "restore" else []
        variants = [variant for variant in found if variant.spec.precision == "int8" and variant.recommended]
        entries += [_entry(written, refer(written, name)), *map(_entry, variants)]
    digits = open_model("va_minimal_vit_nano_patch7_28", DIGITS).model
    written = export_onnx(WithAttention(digits), folder / "digits.onnx", dynamic_size=False, weights="see digits.md")
    labels = [str(digit) for digit in range(digits.num_classes)]
    onnx.save(halved(written), written.path)
    entries.append(_entry(written) | {"blocks": len(digits.blocks), "labels": labels})
    (folder / "models.json").write_text(json.dumps(entries, indent=1))


def halved(written: OnnxFile) -> onnx.ModelProto:
    """The graph with weights in float16, as the package stores them: the outputs are the same."""
    model = onnx.load(written.path)
    halve_weights(model)
    return model


def refer(written: OnnxFile, name: str) -> Path:
    """Store the graph without the weights of a name; they are read from a copy of the package's file, next to it."""
    weights = WEIGHTS / f"{name}.safetensors"
    model = halved(written)
    refer_to_weights(model, weights)
    onnx.save(model, written.path)
    return Path(shutil.copy(weights, written.path.parent))


def _entry(written: OnnxFile | Variant, weights: Path | None = None) -> dict[str, Any]:
    """Entry of a file, and of the weights that it reads, in the page's list."""
    size = written.path.stat().st_size + (weights.stat().st_size if weights else 0)
    print(f"{written.path}: {size / 1e6:.2f} MB")
    entry = {key: getattr(written.spec, key) for key in KEPT if getattr(written.spec, key) is not None}
    entry |= {"weights": f"models/{weights.name}"} if weights else {}
    precision = written.spec.precision or "fp32"
    return entry | {"file": f"models/{written.path.name}", "bytes": size, "precision": precision}


def write_examples(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cat = Image.fromarray(data.chelsea())
    cat.reduce(SMALL).save(folder / "cat.png")
    digit_strip().save(folder / "digits.png")
    for side, view in zip(("left", "right"), data.stereo_motorcycle()):
        Image.fromarray(view).save(folder / f"{side}.jpg", quality=80)


def main() -> None:
    public = Path(sys.argv[1])
    write_models(public / "models")
    write_examples(public / "examples")


if __name__ == "__main__":
    main()
