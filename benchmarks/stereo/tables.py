"""The documentation's tables of stereo matching."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import machines, markdown, plain
from benchmarks.report import RESULTS, read_rows

MEMORY = {"held_mib": "live tensors MiB", "bytes_a_pixel": "bytes per pixel", "weights_mib": "weights MiB"}
PRECISION = {"largest_px": "largest value px", "share_off_by_1px": "proportion off by 1 px"}
SCENE_MEASURES = ("bad-2 %", "EPE px", "bad-1 %", "bad-4 %", "D1 %", "density %")
TRAINING = {
    "run": "run",
    "crop size": "crop_size",
    "max disparity": "max_disparity",
    "updates": "updates",
    "EPE": "epe",
    "EPE, non-occluded": "nonocc_epe",
    "bad-1 %": "bad_1",
    "bad-2 %": "bad_2",
    "bad-2 %, non-occluded": "nonocc_bad_2",
}


def match_stereo_scenes() -> str:
    """bad-2 of each scene and means of all measures, our network and semi-global matching."""
    rows = [row for row in read_rows(RESULTS / "match_stereo_scenes.csv") if row["region"] == "all"]
    if not rows:
        return "Not measured yet.\n"
    scenes = sorted({row["scene"] for row in rows})
    measures = ("bad_2", "epe", "bad_1", "bad_4", "d1", "density")
    groups: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["options"]), {})[row["scene"]] = row
    body = []
    for (model, options), found in sorted(groups.items()):
        name = f"`{model}`" + f", {options}" * bool(options)
        means = (statistics.fmean(float(row[key]) for row in found.values()) for key in measures)
        cells = [f"{float(found[scene]['bad_2']):.1f}" for scene in scenes]
        body.append([name, *cells, *(f"{mean:.1f}" for mean in means)])
    head = ["model", *scenes, *(f"mean {title}" for title in SCENE_MEASURES)]
    origin = machines(rows)
    return markdown(head, body) + f"\nColumns of scenes: bad-2 in %. {origin}.\n"


def match_stereo_fields() -> str:
    """Errors of each field of a stereo network, one column per network."""
    rows = read_rows(RESULTS / "match_stereo_fields.csv")
    if not rows:
        return "Not measured yet.\n"
    cases = dict.fromkeys((row["size"], row["network"]) for row in rows)
    found = {(row["size"], row["network"], row["field"]): row for row in rows}
    head = ["field", *(f"{size}, {network.removeprefix('va_match_stereo_')}" for size, network in cases)]
    body = []
    fields = {row["field"] for row in rows if not row["field"].endswith("self")}
    for field in sorted(fields, key=_place_of_field):
        own = [found.get((*case, field)) for case in cases]
        body.append([field, *(f"{float(r['epe']):.2f}, {float(r['bad_16']):.1f} %" if r else "" for r in own)])
    return markdown(head, body) + "\nEPE in pixels, and the percentage of pixels with an error above 16 pixels.\n"


def _place_of_field(field: str) -> tuple[int, int, int]:
    """Order in which the fields of a network come: from 1/32 on, what comes before the layers first."""
    if field == "result":
        return 0, 0, 0
    size, *place = field.removeprefix("1/").split(", ")
    layer = int(place[0].removeprefix("layer ")) if place[0].startswith("layer") else 0
    return -int(size), layer, int(place[-1] == "cross")


def match_stereo_training() -> str:
    """Errors on held-out generated pairs at the end of each run."""
    rows = read_rows(RESULTS / "match_stereo_training.csv")
    if not rows:
        return "Not measured yet.\n"
    last = {row["run"]: row for row in rows}
    return markdown(list(TRAINING), ([row[key] for key in TRAINING.values()] for row in last.values()))


def flow_pairs() -> str:
    """Errors of flow methods, means over the pairs of a kind."""
    rows = read_rows(RESULTS / "flow_pairs.csv")
    if not rows:
        return "Not measured yet.\n"
    measures = ("epe", "bad_1", "bad_2", "bad_4", "d1")
    body = ([row["data"], row["method"], *(f"{float(row[key]):.1f}" for key in measures)] for row in rows)
    head = ["pairs", "method", "EPE", *(key.replace("_", "-") for key in measures[1:-1]), "Fl"]
    return markdown(head, body) + f"\n{machines(rows)}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "stereo_scenes": lambda: plain("stereo_scenes"),
    "flow_pairs": flow_pairs,
    "match_stereo_scenes": match_stereo_scenes,
    "match_stereo_training": match_stereo_training,
    "match_stereo_fields": match_stereo_fields,
    "stereo_dnn": lambda: plain("stereo_dnn"),
    "match_stereo_speed": lambda: plain("match_stereo_speed", ratio="speed-up", ratio_to="over"),
    "match_stereo_precision": lambda: plain("match_stereo_precision", **PRECISION),
    "match_stereo_memory": lambda: plain("match_stereo_memory", **MEMORY),
}
