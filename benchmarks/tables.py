"""Write the documentation's tables from the CSV files in results/.

    python benchmarks/tables.py            # write them anew
    python benchmarks/tables.py --check    # exit 1 where a page differs from its CSV

A page holds a table between `<!-- results: NAME -->` and `<!-- /results -->`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable

from report import RESULTS, read_rows

DOCS = RESULTS.parent / "docs"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table, numbers to the right of the first column."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows]) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def minimal_vit(data: str, long: bool) -> str:
    """Runs on a data set: those trained longest, or the grid of several seeds."""
    rows = [row for row in read_rows(RESULTS / "minimal_vit.csv") if row["data"] == data]
    if not rows:
        return "Not measured yet.\n"
    epochs = sorted({int(row["epochs"]) for row in rows})
    wanted = epochs[-1] if long else epochs[0]
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if int(row["epochs"]) == wanted:
            groups.setdefault(row["run"], []).append(row)
    first = next(iter(groups.values()))[0]

    def place(item: tuple[str, list[dict[str, str]]]) -> tuple[int, int]:
        row = item[1][0]
        return ("variant", "budget", "readout", "replication").index(row["group"]), -int(row["parameters"])

    head = ["run", "accuracy %", "loss", "calibration error %", "parameters", "MACs (M)", "seeds"]
    body = [
        [
            f"`{run}`",
            spread([float(row["test_accuracy"]) for row in found], 2),
            spread([float(row["test_loss"]) for row in found], 3),
            spread([float(row["test_calibration_error"]) for row in found], 2),
            f"{int(found[0]['parameters']):,}",
            f"{int(found[0]['macs']) / 1e6:.2f}",
            str(len(found)),
        ]
        for run, found in sorted(groups.items(), key=place)
    ]
    devices = ", ".join(sorted({row["device"] for found in groups.values() for row in found}))
    images = int(first["train_images"])
    return (
        markdown(head, body)
        + f"\n{images:,} training images, {wanted} epoch{'s' * (wanted > 1)}, {devices}, torch {first['torch']}.\n"
    )


def plain(name: str) -> str:
    """A script's CSV as it is, less the columns that say where a row comes from."""
    rows = read_rows(RESULTS / f"{name}.csv")
    if not rows:
        return "Not measured yet.\n"
    shown = [key for key in rows[0] if key not in ("torch", "triton", "git_revision", "date", "seed")]
    return markdown(shown, ([row[key] for key in shown] for row in rows))


def calls(name: str, part: str) -> str:
    """Calls of one part of a script, a table for each device."""
    rows = [row for row in read_rows(RESULTS / f"{name}.csv") if row["part"] == part]
    if not rows:
        return "Not measured yet.\n"
    memory = [key for key in ("peak_mib", "saved_mib") if any(row.get(key) for row in rows)]
    head = ["case", "dtype", "pass", "implementation", "median ms", "spread", "ratio"]
    head += [key.replace("_mib", " MiB") for key in memory]
    tables = []
    for device in dict.fromkeys(row["device"] for row in rows):
        found = [row for row in rows if row["device"] == device]
        body = (
            [
                *(row[key] for key in ("case", "dtype", "pass", "implementation")),
                *(row[key] and f"{float(row[key]):.2f}" for key in ("median_ms", "iqr_ms", "ratio")),
                *(row.get(key) and f"{float(row[key]):,.0f}" for key in memory),
            ]
            for row in found
        )
        threads = f"{found[0]['threads']} thread{'s' * (found[0]['threads'] != '1')}"
        tables.append(markdown(head, body) + f"\n{device}, {threads}, torch {found[0]['torch']}.\n")
    return "\n".join(tables)


def halonet_cifar10() -> str:
    """Runs trained longest, best first."""
    rows = read_rows(RESULTS / "halonet_cifar10.csv")
    if not rows:
        return "Not measured yet.\n"
    epochs = max(int(row["epochs"]) for row in rows)
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if int(row["epochs"]) == epochs:
            groups.setdefault(row["run"], []).append(row)
    body = [
        [
            f"`{run}`",
            spread([float(row["test_accuracy"]) for row in found], 2),
            spread([float(row["test_loss"]) for row in found], 3),
            f"{int(found[0]['parameters']):,}",
            f"{int(found[0]['macs']) / 1e6:.1f}",
            str(len(found)),
        ]
        for run, found in groups.items()
    ]
    body.sort(key=lambda cells: cells[1], reverse=True)
    head = ["run", "accuracy %", "loss", "parameters", "MACs (M)", "seeds"]
    origin = f"{rows[0]['device']}, torch {rows[0]['torch']}"
    return markdown(head, body) + f"\n{int(rows[0]['train_images']):,} training images, {epochs} epochs, {origin}.\n"


def probe_sweep() -> str:
    """The time of a sweep as a share of that of its heads one after the other, or of a single head's."""
    rows = [row for row in read_rows(RESULTS / "probe_sweep.csv") if row["share"]]
    if not rows:
        return "Not measured yet.\n"
    head = ["tokens and heads", "the sweep's time over that of", "by the clock", "of the processor", "device"]
    keys = ("case", "implementation", "share", "cpu_share", "device")
    return markdown(head, ([row[key] for key in keys] for row in rows))


def ulsam_costs() -> str:
    """Counted beside printed, a row a network."""
    rows = read_rows(RESULTS / "ulsam_costs.csv")
    head = ["paper's table", "network", "ULSAM", "parameters", "M", "printed", "", "MACs", "M", "printed", ""]
    keys = [f"{name}{what}" for name in ("parameters", "macs") for what in ("", "_from_printed_base_m")]
    body = [
        [
            *(row[key] for key in ("table", "network", "ulsam")),
            *(f"{int(row[keys[0]]):,}", row[keys[1]], row["printed_parameters_m"], row["parameters_verdict"]),
            *(f"{int(row[keys[2]]):,}", row[keys[3]], row["printed_macs_m"], row["macs_verdict"]),
        ]
        for row in rows
    ]
    return markdown(head, body)


def ulsam_controls(data: str) -> str:
    """Runs trained longest on a data set, and their differences to the baseline of the same seed."""
    rows = [
        row for row in read_rows(RESULTS / "ulsam_controls.csv") if (row["data"] == "cifar10") == (data == "cifar10")
    ]
    if not rows:
        return "Not measured yet.\n"
    tables = []
    for name, size in dict.fromkeys((row["data"], row["size"]) for row in rows):
        found = [row for row in rows if (row["data"], row["size"]) == (name, size)]
        epochs = max(int(row["epochs"]) for row in found)
        groups: dict[str, dict[str, dict[str, str]]] = {}
        for row in found:
            if int(row["epochs"]) == epochs:
                groups.setdefault(row["run"], {})[row["seed"]] = row
        body = []
        for run, seeds in groups.items():
            accuracy = {seed: float(row["test_accuracy"]) for seed, row in seeds.items()}
            base = {seed: float(row["test_accuracy"]) for seed, row in groups.get("baseline", {}).items()}
            differences = [accuracy[seed] - base[seed] for seed in accuracy if seed in base and run != "baseline"]
            first = next(iter(seeds.values()))
            body.append(
                [
                    f"`{run}`",
                    spread(list(accuracy.values()), 2),
                    spread(differences, 2) if differences else "",
                    f"{float(first['test_accuracy_low']):.1f} to {float(first['test_accuracy_high']):.1f}",
                    f"{int(first['parameters']):,}",
                    f"{int(first['macs']) / 1e6:.2f}",
                    f"{statistics.median(float(row['latency_ratio']) for row in seeds.values()):.2f}",
                    str(len(seeds)),
                ]
            )
        head = ["run", "accuracy %", "to the baseline", "95 % (first seed)", "parameters", "MACs (M)", "speed", "seeds"]
        images = f"{int(found[0]['train_images']):,} training images of {size} x {size}, {epochs} epochs"
        devices = " and ".join(dict.fromkeys(row["device"] for row in found))
        origin = f"{devices}, torch {found[0]['torch']}"
        tables.append(markdown(head, body) + f"\n{name}: {images}, {origin}.\n")
    return "\n".join(tables)


def kernel_resources() -> str:
    """What compiled kernels take, by operator, dtype and version of Triton, over all chips and configurations."""
    rows = read_rows(RESULTS / "kernel_resources.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        operator = re.sub(r"_(fwd|bwd)_.*", "", row["kernel"])
        groups.setdefault((operator, row["dtype"], row["triton"]), []).append(row)
    head = [
        "operator",
        "dtype",
        "Triton",
        "compiled",
        "registers",
        "shared bytes",
        "with tensor cores",
        "spill",
        "most spilled bytes",
    ]
    body = []
    for (operator, dtype, triton), found in sorted(groups.items()):
        spilled = [int(row["stack"]) + int(row["local"]) for row in found]
        registers = sorted(int(row["registers"]) for row in found)
        body.append(
            [
                f"`{operator}`",
                dtype,
                triton,
                str(len(found)),
                f"{registers[0]} to {registers[-1]}",
                f"{max(int(row['shared']) for row in found):,}",
                str(sum(row["tensor_core"] != "0" for row in found)),
                str(sum(map(bool, spilled))),
                f"{max(spilled):,}",
            ]
        )
    return markdown(head, body) + "\nsm_80, sm_90 and sm_100; compiled only.\n"


def kernel_model() -> str:
    """Modelled times by kernel and shape."""
    rows = read_rows(RESULTS / "kernel_model.csv")
    if not rows:
        return "Not computed yet.\n"
    head = ["shape", "kernel", "instructions a thread", "MB", "issue us", "memory us", "expected us"]
    keys = ("instructions", "megabytes", "issue_us", "memory_us", "expected_us")
    return markdown(head, ([row["shape"], f"`{row['kernel']}`", *(row[key] for key in keys)] for row in rows))


def probe_evidence() -> str:
    """Heads by backbones and data: accuracy with its interval, the best of each column in bold."""
    rows = read_rows(RESULTS / "probe_evidence.csv")
    if not rows:
        return "Not measured yet.\n"
    cases = list(dict.fromkeys((row["backbone"], row["data"]) for row in rows))
    heads = list(dict.fromkeys(row["head"] for row in rows))
    cells = {(row["backbone"], row["data"], row["head"]): row for row in rows}
    best = {
        case: max(float(row["accuracy"]) for row in rows if (row["backbone"], row["data"]) == case and row["lr"])
        for case in cases
    }

    def cell(case: tuple[str, str], head: str) -> str:
        row = cells.get((*case, head))
        if row is None:
            return ""
        half = (float(row["high"]) - float(row["low"])) / 2
        text = f"{row['accuracy']} ± {half:.2f}"
        return f"**{text}**" if row["lr"] and float(row["accuracy"]) == best[case] else text

    head = ["head", *(f"{backbone}: {data}" for backbone, data in cases)]
    return markdown(head, ([name, *(cell(case, name) for case in cases)] for name in heads))


def probe_evidence_costs() -> str:
    """The pre-trained ViT on CIFAR-10: accuracy beside parameters, arithmetic and time."""
    rows = [
        row
        for row in read_rows(RESULTS / "probe_evidence.csv")
        if row["backbone"].startswith("micro ViT, masked") and row["data"] == "cifar10" and "a class" not in row["head"]
    ]
    if not rows:
        return "Not measured yet.\n"
    head = ["head", "accuracy %", "EP ahead by", "p", "parameters", "MACs (M)", "step ms", "calibration error %"]

    def ahead(row: dict[str, str]) -> str:
        return row["ahead"] and f"{row['ahead']} ({row['ahead_low']} to {row['ahead_high']})"

    body = (
        [
            row["head"],
            f"{row['accuracy']} ({row['low']} to {row['high']})",
            ahead(row),
            row["p_holm"],
            f"{int(row['parameters']):,}",
            row["mega_macs"],
            row["step_ms"],
            row["calibration_error"],
        ]
        for row in rows
    )
    return markdown(head, body) + f"\n{rows[0]['device']}, torch {rows[0]['torch']}, seed {rows[0]['seed']}.\n"


def retrieval_heads() -> str:
    """Mean and spread over seeds, a row for each way to embed."""
    rows = read_rows(RESULTS / "retrieval_heads.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("regime", "backbone", "pixels", "epochs", "head")), []).append(row)
    measured = [key for key in rows[0] if key.startswith("test_")]
    head = ["backbone", "head", *(key.removeprefix("test_") for key in measured), "trained", "seeds"]
    body = []
    for (regime, backbone, pixels, epochs, name), found in groups.items():
        setting = f"`{backbone}`, {pixels} pixels, {regime}, {epochs} epochs" if backbone else "none"
        shares = (spread([float(row[key]) for row in found], 1) for key in measured)
        trained = found[0]["parameters"] and f"{int(found[0]['parameters']):,}"
        body.append([setting, name, *shares, trained, str(len(found))])
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return markdown(head, body) + f"\n{devices}, torch {rows[-1]['torch']}.\n"


def retrieval_entanglement() -> str:
    """The matrix of each head, mean over seeds, in the setting that was measured last."""
    rows = read_rows(RESULTS / "retrieval_entanglement.csv")
    if not rows:
        return "Not measured yet.\n"
    setting = ("regime", "backbone", "epochs", "pixels")
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in setting)]
    known = (*setting, "head", "seed", "condition", "device", "torch", "triton", "git_revision", "date")
    attributes = [key for key in rows[0] if key not in known]
    body = []
    for head, condition in dict.fromkeys((row["head"], row["condition"]) for row in rows):
        found = [row for row in rows if (row["head"], row["condition"]) == (head, condition)]
        shares = (statistics.fmean(float(row[key]) for row in found) for key in attributes)
        body.append([head, condition, *(f"{share:.1f}" for share in shares)])
    words = "`{backbone}`, {pixels} pixels, {regime}, {epochs} epochs".format(**rows[0])
    return markdown(["head", "asked for", *attributes], body) + f"\n{words}.\n"


def dual_cross() -> str:
    """Mean and spread over seeds, a row for each way to train and to read out."""
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
    head = ["run", "epochs", "read out", "accuracy %", "mAP %", "seconds", "seeds"]
    devices = ", ".join(sorted({row["device"] for row in rows}))
    return markdown(head, body) + f"\n{devices}, torch {rows[-1]['torch']}.\n"


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
    "minimal_vit_mnist_long": lambda: minimal_vit("mnist", long=True),
    "minimal_vit_mnist_grid": lambda: minimal_vit("mnist", long=False),
    "minimal_vit_cifar10_long": lambda: minimal_vit("cifar10", long=True),
    "minimal_vit_speed": lambda: plain("minimal_vit_speed"),
    "symmetric_gate": lambda: plain("symmetric_gate"),
    "stereo_scenes": lambda: plain("stereo_scenes"),
    "halo_attention_layer": lambda: calls("halo_attention", "layer"),
    "halo_attention_growth": lambda: calls("halo_attention", "growth"),
    "halo_attention_model": lambda: calls("halo_attention", "model"),
    "halo_attention_onnx": lambda: calls("halo_attention", "onnx"),
    "multi_query_pool_block": lambda: calls("multi_query_pool", "block"),
    "multi_query_pool_operator": lambda: calls("multi_query_pool", "operator"),
    "multi_query_pool_int8": lambda: calls("multi_query_pool", "int8"),
    "match_attention_operator": lambda: calls("match_attention", "operator"),
    "match_attention_block": lambda: calls("match_attention", "block"),
    "subspace_attention": lambda: calls("subspace_attention", "block"),
    "ulsam_costs": ulsam_costs,
    "ulsam_controls_cifar10": lambda: ulsam_controls("cifar10"),
    "ulsam_controls_others": lambda: ulsam_controls("others"),
    "halonet_cifar10": halonet_cifar10,
    "span_psnr": lambda: plain("span_psnr"),
    "match_stereo_scenes": match_stereo_scenes,
    "match_stereo_training": match_stereo_training,
    "match_stereo_fields": match_stereo_fields,
    "stereo_dnn": lambda: plain("stereo_dnn"),
    "match_stereo_speed": lambda: plain("match_stereo_speed"),
    "match_stereo_precision": lambda: plain("match_stereo_precision"),
    "span_speed": lambda: plain("span_speed"),
    "upscale_memory": lambda: plain("upscale_memory"),
    "probe_poolings": lambda: plain("probe_poolings"),
    "probe_sweep": probe_sweep,
    "probe_evidence": probe_evidence,
    "probe_evidence_costs": probe_evidence_costs,
    "probe_extraction": lambda: plain("probe_extraction"),
    "retrieval_heads": retrieval_heads,
    "retrieval_entanglement": retrieval_entanglement,
    "dual_cross": dual_cross,
    "search_index": lambda: plain("search_index"),
    "retrieval_cost": lambda: plain("retrieval_cost"),
    "kernel_resources": kernel_resources,
    "kernel_model": kernel_model,
    "gpu_checks": lambda: plain("gpu_checks"),
    "networks": lambda: plain("networks"),
    "match_stereo_memory": lambda: plain("match_stereo_memory"),
}


def render(page: str) -> str:
    """A page with its tables written anew."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in sorted(DOCS.rglob("*.md")):
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(str(path.relative_to(DOCS.parent)))
            if not args.check:
                path.write_text(new)
    print(f"{'Stale' if args.check else 'Written'}: {', '.join(stale) or 'none'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
