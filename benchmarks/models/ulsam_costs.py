"""ULSAM's table by arithmetic: parameters and multiply-accumulates of every network in its tables, ours and printed.

    python -m benchmarks.models.ulsam_costs

Writes results/ulsam_costs.csv. The authors' slides, poster and code do not state the positions of their modules; which
position explains a printed row is inferred from its cost. Rows with ULSAM are differences to the printed base: the
columns `from_printed_base` are that base, plus what the change adds or saves here. A verdict says whether that agrees
with the printed number to its last digit (`equal`), agrees if digits are cut off instead of rounded (`cut off`), or by
how much it is off.
"""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

import timm

import visionattn  # noqa: F401  registers the names
from benchmarks.report import RESULTS, environment, write_rows
from visionattn.cost import count_macs, count_parameters

V1 = ("MobileNet-V1", "va_mobilenetv1_ulsam_100", ("4.2", "569"))
V1_075 = ("MobileNet-V1 0.75", "va_mobilenetv1_ulsam_075", ("2.6", "325"))
V1_050 = ("MobileNet-V1 0.50", "va_mobilenetv1_ulsam_050", ("1.3", "149"))
V2 = ("MobileNet-V2", "va_mobilenetv2_ulsam_100", ("3.4", "300"))
BASE: tuple[str, tuple[int, ...]] = ("replace", ())

# Table, network, what stands where (mode, numbers of blocks), in words, printed parameters and MACs in millions.
ROWS = [
    ("ImageNet, add", V1, BASE, "base", "4.2", "569"),
    ("ImageNet, add", V1, ("add", (7,)), "after 512 channels at 14 x 14", "4.2", "569.2"),
    ("ImageNet, add (second position)", V1, ("add", (11,)), "after 512 channels at 14 x 14", "4.2", "569.2"),
    ("ImageNet, add", V1, ("add", (13,)), "after 1024 channels at 7 x 7", "4.2", "569.1"),
    ("ImageNet, add", V2, BASE, "base", "3.4", "300"),
    ("ImageNet, add", V2, ("add", (16,)), "after 160 channels at 7 x 7", "3.4", "300.01"),
    ("ImageNet, replace", V1, ("replace", (11,)), "for one of five 512", "3.9", "517"),
    ("ImageNet, replace", V1_075, BASE, "base", "2.6", "325"),
    ("ImageNet, replace", V1_075, ("replace", (11,)), "for one of five 384", "2.4", "296"),
    ("ImageNet, replace", V1_050, BASE, "base", "1.3", "149"),
    ("ImageNet, replace", V1_050, ("replace", (11,)), "for one of five 256", "1.2", "136"),
    ("ImageNet, replace", V2, ("replace", (13, 16)), "for 96 and 160", "2.96", "261.88"),
    ("ImageNet, replace", V2, ("replace", (15, 16)), "for 2 x 160", "2.77", "269.07"),
    ("ImageNet, replace", V2, ("replace", (12, 13, 15, 16)), "for 2 x 96 and 2 x 160", "2.54", "223.77"),
    ("Food-101, Birds, Dogs, replace", V1, ("replace", (11,)), "for one of five 512", "3.9", "517"),
    ("Birds, replace", V2, ("replace", (13,)), "for 96", "3.28", "277.34"),
    ("Birds, replace", V2, ("replace", (16,)), "for 160", "3.08", "284.54"),
    ("Birds, replace", V2, ("replace", (10, 13)), "for 64 and 96", "3.23", "267.06"),
    ("Birds, replace", V2, ("replace", (15, 16)), "for 2 x 160", "2.77", "269.08"),
    ("Birds, replace", V2, ("replace", (13, 16)), "for 96 and 160", "2.97", "261.88"),
    ("Birds, replace", V2, ("replace", (12, 13, 15, 16)), "for 2 x 96 and 2 x 160", "2.54", "224.16"),
    ("unnamed set, replace", V2, ("replace", (13,)), "for 96", "3.28", "277.34"),
    ("unnamed set, replace", V2, ("replace", (16,)), "for 160", "3.08", "284.54"),
    ("unnamed set, replace", V2, ("replace", (13, 16)), "for 96 and 160", "2.97", "261.88"),
    ("unnamed set, replace", V2, ("replace", (12, 13, 15, 16)), "for 2 x 96 and 2 x 160", "2.54", "224.16"),
]


def counts(name: str, mode: str, places: tuple[int, ...]) -> tuple[int, int]:
    """Parameters and multiply-accumulates at 224 x 224."""
    model = timm.create_model(name, mode=mode, places=places, device="meta")
    return count_parameters(model), count_macs(model, (3, 224, 224))


def verdict(found: Decimal, printed: str) -> str:
    """How a number in millions agrees with a printed one."""
    wanted = Decimal(printed)
    digit = Decimal(1).scaleb(wanted.as_tuple().exponent)
    for name, rounding in {"equal": ROUND_HALF_UP, "cut off": ROUND_DOWN}.items():
        if found.quantize(digit, rounding) == wanted:
            return name
    return f"off by {wanted - found:+.3f}"


def main() -> None:
    origin, rows = environment("cpu"), []
    for table, (network, name, printed_base), (mode, places), words, *printed in ROWS:
        base, found = counts(name, *BASE), counts(name, mode, places)
        millions = [Decimal(number) / 10**6 for number in found]
        if places:
            pairs = zip(printed_base, found, base, strict=True)
            millions = [Decimal(of) + Decimal(number - before) / 10**6 for of, number, before in pairs]
        row = {
            "table": table,
            "network": network,
            "ulsam": words,
            "parameters": found[0],
            "macs": found[1],
            "parameters_from_printed_base_m": f"{millions[0]:.4f}",
            "printed_parameters_m": printed[0],
            "parameters_verdict": verdict(millions[0], printed[0]),
            "macs_from_printed_base_m": f"{millions[1]:.4f}",
            "printed_macs_m": printed[1],
            "macs_verdict": verdict(millions[1], printed[1]),
            **origin,
        }
        rows.append(row)
        print(*(str(value) for value in list(row.values())[:11]), sep=" | ", flush=True)
    write_rows(RESULTS / "ulsam_costs.csv", rows, key=("table", "network", "ulsam", "printed_macs_m"))


if __name__ == "__main__":
    main()
