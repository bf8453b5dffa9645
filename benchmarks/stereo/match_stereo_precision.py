"""MatchStereo in half precision: whether every field is finite, and how far the disparities are from float32's.

    python -m benchmarks.stereo.match_stereo_precision [--sizes 1248x384 3840x2176] [--device cuda]

nano has its own weights, tiny random ones. `network` is a network whose weights are of the half precision, `autocast`
one of float32 under torch.autocast. One pair, which `match_stereo_speed.py` describes; differences in pixels over the
signed fields of both views. Writes results/match_stereo_precision.csv.
"""

from __future__ import annotations

import argparse
import copy
from itertools import product

import timm
import torch

from benchmarks.report import RESULTS, environment, write_rows
from benchmarks.stereo.match_stereo_speed import NANO, TINY, network, pair


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1248x384", "3840x2176"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--models", nargs="+", default=[NANO, TINY], choices=[NANO, TINY])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for name, size in product(args.models, args.sizes):
        model = timm.create_model(NANO, pretrained=True).eval() if name == NANO else network(TINY, None)
        model, views = model.to(args.device), [view.to(args.device) for view in pair(*map(int, size.split("x")))]
        exact = model.forward_fields(*views).field
        for dtype, form in product((torch.bfloat16, torch.float16), ("network", "autocast")):
            if form == "network":
                fields = copy.deepcopy(model).to(dtype).forward_fields(*(view.to(dtype) for view in views))
            else:
                with torch.autocast(args.device, dtype):
                    fields = model.forward_fields(*views)
            tensors = [fields.start, *fields.after_self, *fields.after_cross, fields.field]
            finite = all(bool(field.isfinite().all()) for field in tensors)
            error = (fields.field - exact)[..., 0].abs().flatten()
            row = {
                "model": name,
                "input": size,
                "dtype": str(dtype).removeprefix("torch."),
                "form": form,
                "finite": finite,
                "field_dtype": str(fields.field.dtype).removeprefix("torch."),
                "largest_px": f"{exact[..., 0].abs().max():.1f}",
                "median_error_px": f"{error.median():.4f}",
                "mean_error_px": f"{error.mean():.4f}",
                "share_off_by_1px": f"{(error > 1).double().mean():.4f}",
                "seed": 0,
                **environment(args.device),
            }
            print(*list(row.values())[:10], sep=" | ", flush=True)
            write_rows(RESULTS / "match_stereo_precision.csv", [row], key=("device", "model", "input", "dtype", "form"))


if __name__ == "__main__":
    main()
