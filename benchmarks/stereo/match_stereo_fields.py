"""What each layer of a MatchStereo network adds: errors of all its fields on generated pairs, in pixels of the image.

    python -m benchmarks.stereo.match_stereo_fields [FILE ...] --photographs FOLDER

Networks are the shipped one and weights from files. Pairs of each size are the same for all, none of which was trained
on. A field is compared with the ground truth of its own map (`coarse_truth`), of which a coarser map has less: errors
are comparable within a size of map. Pixels that both views see. Writes results/match_stereo_fields.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor

import visionattn
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.data.matching.scenes import GeneratedPairs
from visionattn.models.match_stereo import MatchFields
from visionattn.train.stereo import coarse_truth

SHIPPED = "va_match_stereo_nano"
SIZES = {(256, 640): 256.0, (544, 640): 110.0}
PAIRS, SEED = 32, 77
BAD = (1, 2, 4, 16)


def named_fields(found: MatchFields, width: int) -> dict[str, Tensor]:
    """Name, such as "1/8, layer 2, cross" -> field, in the order in which they come."""
    named, layers = {"1/32, start": found.start}, dict.fromkeys((32, 16, 8, 4), 0)
    upsampled = {width // field.shape[2]: field for field in found.upsampled}
    for after_self, after_cross in zip(found.after_self, found.after_cross):
        stride = width // after_self.shape[2]
        if not layers[stride] and stride in upsampled:
            named[f"1/{stride}, upsampled"] = upsampled[stride]
        layers[stride] += 1
        place = f"1/{stride}, layer {layers[stride]}"
        named |= {f"{place}, self": after_self, f"{place}, cross": after_cross}
    return named | {"result": found.field}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--photographs", type=Path, required=True)
    args = parser.parse_args()
    networks = {SHIPPED: timm.create_model(SHIPPED, pretrained=True)}
    networks |= {file.stem: visionattn.load(file) for file in args.files}
    rows = []
    for name, network in networks.items():
        network.eval()
        for size, reach in SIZES.items():
            pairs = GeneratedPairs(PAIRS, size, reach, [args.photographs], seed=SEED)
            errors: dict[str, list[Tensor]] = {}
            for number in range(PAIRS):
                pair = pairs[number]
                views = torch.from_numpy(pair.views).permute(0, 3, 1, 2).unsqueeze(1) / 255
                truth, seen = torch.from_numpy(pair.fields), torch.from_numpy(pair.seen)
                with torch.inference_mode():
                    found = network.forward_fields(*views)
                for place, field in named_fields(found, size[1]).items():
                    stride = size[1] // field.shape[2]
                    wanted, shown = coarse_truth(truth, seen, stride) if stride > 1 else (truth, seen)
                    error = stride * (field - wanted)[..., 0].abs()
                    errors.setdefault(place, []).append(error[shown & error.isfinite()])
            for place, parts in errors.items():
                means = torch.tensor([[part.mean(), *((part > b).float().mean() * 100 for b in BAD)] for part in parts])
                values = dict(zip(("epe", *(f"bad_{b}" for b in BAD)), means.mean(0).tolist()))
                row = {"network": name, "size": " x ".join(map(str, size)), "max_disparity": reach, "field": place}
                row |= {key: f"{value:.3f}" for key, value in values.items()} | {"pairs": PAIRS, "seed": SEED}
                rows.append(row | environment("cpu"))
    write_rows(RESULTS / "match_stereo_fields.csv", rows, key=("network", "size", "field"))


if __name__ == "__main__":
    main()
