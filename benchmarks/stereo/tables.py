"""The documentation's tables of stereo matching."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import markdown, plain
from benchmarks.report import RESULTS, read_rows


def match_stereo_scenes() -> str:
    """Errors of each scene, our network and semi-global matching."""
    rows = [row for row in read_rows(RESULTS / "match_stereo_scenes.csv") if row["region"] == "all"]
    rows.sort(key=lambda row: row["scene"])
    if not rows:
        return "Not measured yet.\n"
    measures = ("epe", "bad_1", "bad_2", "bad_4", "d1", "density")
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["enlarge"]), []).append(row)
    means = [
        {**found[0], "scene": "mean"}
        | {key: str(statistics.fmean(float(row[key]) for row in found)) for key in measures}
        for found in groups.values()
    ]
    body = [
        [row["scene"], f"`{row['model']}`", row["enlarge"], *(f"{float(row[key]):.1f}" for key in measures)]
        for row in rows + means
    ]
    head = ["scene", "model", "views enlarged", "EPE", *(key.replace("_", "-") for key in measures[1:])]
    return markdown(head, body) + f"\n{rows[0]['device']}, torch {rows[0]['torch']}.\n"


def match_stereo_fields() -> str:
    """Errors of each field of a stereo network, networks side by side."""
    rows = read_rows(RESULTS / "match_stereo_fields.csv")
    if not rows:
        return "Not measured yet.\n"
    cases = dict.fromkeys((row["size"], row["network"]) for row in rows)
    found = {(row["size"], row["network"], row["field"]): row for row in rows}
    head = ["field", *(f"{size}, {network.removeprefix('va_match_stereo_')}" for size, network in cases)]
    body = []
    for field in sorted({row["field"] for row in rows}, key=_place_of_field):
        own = [found.get((*case, field)) for case in cases]
        body.append([field, *(f"{float(r['epe']):.2f}, {float(r['bad_16']):.1f} %" if r else "" for r in own)])
    return markdown(head, body) + "\nEPE, and the share that is more than 16 pixels off.\n"


def _place_of_field(field: str) -> tuple[int, int, int]:
    """Order in which the fields of a network come: from 1/32 on, what comes before the layers first."""
    if field == "result":
        return 0, 0, 0
    size, *place = field.removeprefix("1/").split(", ")
    layer = int(place[0].removeprefix("layer ")) if place[0].startswith("layer") else 0
    return -int(size), layer, int(place[-1] == "cross")


def match_stereo_training() -> str:
    """Errors on held-out generated pairs, epoch by epoch."""
    rows = read_rows(RESULTS / "match_stereo_training.csv")
    if not rows:
        return "Not measured yet.\n"
    columns = ("run", "crop_size", "max_disparity", "updates", "epe", "nonocc_epe", "bad_1", "bad_2", "nonocc_bad_2")
    return markdown([key.replace("_", " ") for key in columns], ([row[key] for key in columns] for row in rows))


TABLES: dict[str, Callable[[], str]] = {
    "stereo_scenes": lambda: plain("stereo_scenes"),
    "match_stereo_scenes": match_stereo_scenes,
    "match_stereo_training": match_stereo_training,
    "match_stereo_fields": match_stereo_fields,
    "stereo_dnn": lambda: plain("stereo_dnn"),
    "match_stereo_speed": lambda: plain("match_stereo_speed"),
    "match_stereo_precision": lambda: plain("match_stereo_precision"),
    "match_stereo_memory": lambda: plain("match_stereo_memory"),
}
