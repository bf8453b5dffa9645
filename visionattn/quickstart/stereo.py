"""Match a stereo pair: the shipped MatchStereo network compared with semi-global matching and the ground truth.

The pair is Motorcycle of Middlebury 2014 at a quarter of its size, which scikit-image contains with its ground truth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from visionattn.checkpoints import create_pretrained
from visionattn.data.matching.disparity import write_disparity
from visionattn.errors import require
from visionattn.evaluate.sgbm import fill, sgbm
from visionattn.metrics.matching import disparity_errors
from visionattn.predict import estimate_disparity
from visionattn.predict.colours import disparity_colours, usual_top
from visionattn.predict.matching import SHIPPED
from visionattn.quickstart import TITLE

STRIP = 28
ENLARGED = 2  # a small network finds finer matches on enlarged views
README = """
| file | what it is |
| --- | --- |
| `left.png` | left view of the pair Motorcycle (Scharstein et al., GCPR 2014) |
| `right.png` | right view |
| `truth.pfm` | ground-truth disparities of the left view in pixels, measured with structured light |
| `network.pfm` | disparities of {name} |
| `compare.png` | both, and semi-global matching with filled gaps, in colours: red is near, black has no value |

{table}

EPE: mean error in pixels where a method gives a value. bad-2: percent of the pixels with ground truth that are off by
more than 2 pixels or have no value: here the {best} has the fewest. OpenCV's semi-global matching is given the largest
disparity, {largest:.0f} pixels. It leaves out uncertain pixels; to fill them, each gap in a row takes the value of its
farther end, and a median filter of 5 x 5 pixels follows. The network is not given the largest disparity, takes the
views enlarged {enlarged} times, and was trained on generated scenes only.

## The same by command, in this folder

    visionattn stereo left.png right.png disparity.png --color --enlarge {enlarged}

## In Python

    import visionattn

    disparity = visionattn.stereo("left.png", "right.png", "{name}", enlarge={enlarged}).disparity
"""


def visit(folder: Path, console: Console) -> None:
    """Match with both methods, measure and draw; write everything into `folder`."""
    left, right, truth = require("skimage.data", "images").stereo_motorcycle()
    truth = np.where(np.isfinite(truth), truth, np.nan)
    largest = float(np.nanmax(truth))
    found = {
        "network": estimate_disparity(left, right, create_pretrained(SHIPPED["stereo"]), enlarge=ENLARGED)[0],
        "semi-global matching": sgbm(left, right, largest),
    }
    found["filled semi-global matching"] = fill(found["semi-global matching"])
    bad = {}
    summary = Table("method", "EPE", "bad-2")
    rows = ["| method | EPE | bad-2 |", "| --- | ---: | ---: |"]
    for name, disparity in found.items():
        errors = disparity_errors(disparity, truth)
        bad[name] = errors.bad_2
        row = name, f"{errors.epe:.2f}", f"{errors.bad_2:.1f}"
        summary.add_row(*row)
        rows.append(f"| {' | '.join(row)} |")
    console.print(summary)
    for side, view in (("left", left), ("right", right)):
        Image.fromarray(view).save(folder / f"{side}.png")
    write_disparity(folder / "truth.pfm", truth)
    write_disparity(folder / "network.pfm", found["network"])
    del found["semi-global matching"]
    _panels({"left view": left, "truth": truth, **found}).save(folder / "compare.png")
    console.print(f"Ground truth, network and filled semi-global matching as colours: {folder / 'compare.png'}")
    best = min(bad, key=lambda name: bad[name])
    readme = README.format(name=SHIPPED["stereo"], table="\n".join(rows), best=best, largest=largest, enlarged=ENLARGED)
    (folder / "README.md").write_text(TITLE + readme)


def _panels(parts: dict[str, np.ndarray]) -> Image.Image:
    """Two by two labelled panels; disparities (H, W) share their colour scale, (H, W, 3) are shown unchanged."""
    height, width = parts["truth"].shape
    picture = Image.new("RGB", (2 * width + 4, 2 * (height + STRIP)), "white")
    pen = ImageDraw.Draw(picture)
    for index, (label, part) in enumerate(parts.items()):
        x, y = index % 2 * (width + 4), index // 2 * (height + STRIP)
        colours = part if part.ndim == 3 else disparity_colours(part, usual_top(parts["truth"]))
        pen.text((x + 4, y + 6), label, fill="black")
        picture.paste(Image.fromarray(colours), (x, y + STRIP))
    return picture
