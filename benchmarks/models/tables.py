"""The documentation's tables of networks."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.markdown import machines, markdown, plain, spread
from benchmarks.report import RESULTS, read_rows

# Runs of the MNIST grid that the page leaves to the CSV.
LEFT_OUT = ("pair_1head", "collapsed_novalue", "shared_nomlp_1head", "novalue_nomlp", "baseline_mean", "minimum_mean")


def minimal_vit(data: str, long: bool) -> str:
    """Runs on a data set: those trained longest, or the grid of several seeds."""
    rows = [row for row in read_rows(RESULTS / "minimal_vit.csv") if row["data"] == data]
    if not rows:
        return "Not measured yet.\n"
    epochs = sorted({int(row["epochs"]) for row in rows})
    wanted = epochs[-1] if long else epochs[0]
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if int(row["epochs"]) == wanted and (long or row["run"] not in LEFT_OUT):
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
    origin = f"{int(rows[0]['train_images']):,} training images, {epochs} epochs, {machines(rows)}"
    return markdown(head, body) + f"\n{origin}.\n"


def ulsam_costs() -> str:
    """Counted and printed costs of the networks on ImageNet."""
    rows = [row for row in read_rows(RESULTS / "ulsam_costs.csv") if row["table"].startswith("ImageNet")]
    head = ["paper's table", "network", "ULSAM"]
    head += ["parameters", "M, from printed base", "printed M", "verdict"]
    head += ["MACs", "M, from printed base", "printed M", "verdict"]
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
        head = ["run", "accuracy %", "difference", "95 % (first seed)", "parameters", "MACs (M)", "speed-up", "seeds"]
        images = f"{int(found[0]['train_images']):,} training images of {size} x {size}, {epochs} epochs"
        devices = " and ".join(dict.fromkeys(row["device"] for row in found))
        origin = f"{devices}, torch {found[0]['torch']}"
        tables.append(markdown(head, body) + f"\n{name}: {images}, {origin}.\n")
    return "\n".join(tables)


def edge_halonet() -> str:
    """HaloNet's exported forms and its peers in ONNX Runtime."""
    rows = read_rows(RESULTS / "edge_halonet.csv")
    if not rows:
        return "Not measured yet.\n"
    head = ["network", "threads", "median ms", "IQR ms", "fastest ms", "speed-up", "file"]
    body = []
    for row in rows:
        name = f"`{row['network']}`" + f", {row['form']}" * bool(row["form"])
        times = (f"{float(row[key]):.1f}" for key in ("median_ms", "iqr_ms", "fastest_ms"))
        body.append([name, row["threads"], *times, f"{float(row['ratio']):.2f}", f"{int(row['bytes']) / 1e6:.1f} MB"])
    return markdown(head, body) + f"\n{machines(rows)}; ONNX Runtime {rows[-1]['onnxruntime']}.\n"


def minimal_vit_speed() -> str:
    """Times and speed-ups of the variants, one row per variant."""
    rows = read_rows(RESULTS / "minimal_vit_speed.csv")
    if not rows:
        return "Not measured yet.\n"
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    body = []
    for variant, found in groups.items():
        by_mode = {row["mode"]: row for row in found}
        times = (f"{float(by_mode[mode]['median_ms']):.0f} ms, {float(by_mode[mode]['ratio']):.2f} x" for mode in modes)
        costs = [f"{int(found[0]['parameters']):,}", f"{int(found[0]['macs']) / 1e6:,.0f}"]
        body.append([variant, *costs, *times])
    first = rows[0]
    origin = f"{first['device']}, {first['threads']} thread, batch {first['batch']}, torch {first['torch']}"
    return markdown(["variant", "parameters", "MACs (M)", *modes], body) + f"\n{origin}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "minimal_vit_mnist_long": lambda: minimal_vit("mnist", long=True),
    "minimal_vit_mnist_grid": lambda: minimal_vit("mnist", long=False),
    "minimal_vit_cifar10_long": lambda: minimal_vit("cifar10", long=True),
    "minimal_vit_speed": minimal_vit_speed,
    "ulsam_costs": ulsam_costs,
    "ulsam_controls_cifar10": lambda: ulsam_controls("cifar10"),
    "ulsam_controls_others": lambda: ulsam_controls("others"),
    "halonet_cifar10": halonet_cifar10,
    "edge_halonet": edge_halonet,
    "networks": lambda: plain("networks"),
}
