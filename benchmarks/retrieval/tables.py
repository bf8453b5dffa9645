"""The documentation's tables of retrieval."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import markdown, plain, spread
from benchmarks.report import RESULTS, read_rows

MATRICES = ("cca", "linear")
LAST_CYCLE = "3"


def retrieval_heads() -> str:
    """mAP, mean and spread over seeds, one row per embedding."""
    rows = read_rows(RESULTS / "retrieval_heads.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("regime", "backbone", "pixels", "epochs", "head")), []).append(row)
    measured = [f"test_{key}" for key in ("subCategory", "articleType", "baseColour", "judged", "all")]
    head = ["backbone", "head", "subCategory", "articleType", "baseColour", "mean of these", "mean of all six", "seeds"]
    body = []
    for (regime, backbone, pixels, epochs, name), found in groups.items():
        setting = f"`{backbone}`, {pixels} pixels, {regime}, {epochs} epochs" if backbone else "none"
        shares = (spread([float(row[key]) for row in found], 1) for key in measured)
        body.append([setting, name, *shares, str(len(found))])
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return markdown(head, body) + f"\n{devices}, torch {rows[-1]['torch']}.\n"


def retrieval_entanglement() -> str:
    """The matrix of two heads, mean over seeds, in the setting that was measured last."""
    rows = read_rows(RESULTS / "retrieval_entanglement.csv")
    if not rows:
        return "Not measured yet.\n"
    setting = ("regime", "backbone", "epochs", "pixels")
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in setting)]
    known = (*setting, "head", "seed", "condition", "device", "torch", "triton", "git_revision", "date")
    attributes = [key for key in rows[0] if key not in known]
    body = []
    for head, condition in dict.fromkeys((row["head"], row["condition"]) for row in rows if row["head"] in MATRICES):
        found = [row for row in rows if (row["head"], row["condition"]) == (head, condition)]
        shares = (statistics.fmean(float(row[key]) for row in found) for key in attributes)
        body.append([head, condition, *(f"{share:.1f}" for share in shares)])
    words = "`{backbone}`, {pixels} pixels, {regime}, {epochs} epochs".format(**rows[0])
    return markdown(["head", "space of", *attributes], body) + f"\n{words}.\n"


def dual_cross() -> str:
    """Mean and spread over seeds, one row per training and readout."""
    rows = read_rows(RESULTS / "dual_cross.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, int, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["run"], int(row["epochs"]), row["read"]), []).append(row)
    body = []
    for (run, epochs, read), found in sorted(groups.items()):
        shares = (spread([float(row[key]) for row in found], 1) for key in ("test_accuracy", "test_map"))
        seconds = statistics.median(float(row["seconds"]) for row in found)
        body.append([f"`{run}`", str(epochs), read, *shares, f"{seconds:.0f}", str(len(found))])
    head = ["run", "epochs", "readout", "accuracy %", "mAP %", "seconds", "seeds"]
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return markdown(head, body) + f"\n{devices}, torch {rows[-1]['torch']}.\n"


def rerank() -> str:
    """Mean and spread over seeds, one row per initialisation and ranking."""
    rows = read_rows(RESULTS / "rerank.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["cycle"] in ("0", LAST_CYCLE):
            groups.setdefault((row["start"], row["method"], row["cycle"]), []).append(row)
    measured = ("subCategory", "articleType", "baseColour", "map", "precision_at_10")
    body = []
    for (start, method, cycle), found in groups.items():
        words = f"{method}, cycle {cycle}" if int(cycle) else method
        shares = (spread([float(row[key]) for row in found], 1) for key in measured)
        # Seeds are paired: each is compared with its own ranking by cosine.
        plain_map = {row["seed"]: float(row["map"]) for row in groups[start, "none", "0"]}
        gains = [float(row["map"]) - plain_map[row["seed"]] for row in found]
        body.append([start, words, *shares, spread(gains, 2), str(len(found))])
    head = ["embedding", "ranked by", *measured[:3], "mAP", "precision@10", "gain in mAP", "seeds"]
    setting = "{images} training images, {partners} nearest and random partners each, width {width}, depth {depth}"
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return markdown(head, body) + f"\n{setting.format(**rows[-1])}; {devices}, torch {rows[-1]['torch']}.\n"


def retrieval_cost() -> str:
    """Time of one attribute over that of six, one row per backbone, one column per head."""
    rows = [row for row in read_rows(RESULTS / "retrieval_cost.csv") if row["asked"] == "six attributes"]
    if not rows:
        return "Not measured yet.\n"
    cells = {(row["backbone"], row["head"]): f"{float(row['ratio']):.3f}" for row in rows}
    heads = list(dict.fromkeys(row["head"] for row in rows))
    names = dict.fromkeys(row["backbone"] for row in rows)
    body = ([f"`{name}`", *(cells.get((name, head), "") for head in heads)] for name in names)
    first = rows[0]
    origin = f"{first['device']}, {first['threads']} thread, batch {first['batch']}, torch {first['torch']}"
    return markdown(["backbone", *heads], body) + f"\n{origin}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "retrieval_heads": retrieval_heads,
    "retrieval_entanglement": retrieval_entanglement,
    "dual_cross": dual_cross,
    "rerank": rerank,
    "search_index": lambda: plain("search_index"),
    "search_scale": lambda: plain("search_scale"),
    "retrieval_cost": retrieval_cost,
}
