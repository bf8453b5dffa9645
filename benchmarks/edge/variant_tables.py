"""The documentation's table of variants, made of results/edge_variants.csv."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import markdown
from benchmarks.report import RESULTS, read_rows


def edge_variants() -> str:
    """A row for each variant: metric of float32 and its own, size, speed."""
    body = []
    for row in read_rows(RESULTS / "edge_variants.csv"):
        written = row["written"] == "True"
        body.append(
            [
                row["model"],
                row["variant"],
                f"{row['metric']}, {row['data']}",
                f"{float(row['float32']):.5g}",
                f"{float(row['value']):.5g}",
                f"{int(row['bytes']) / 1000:,.0f}" if written else "not written",
                f"{float(row['speed']):.2f} ± {float(row['speed_half_iqr']):.2f}" if written else "",
            ]
        )
    return markdown(["model", "variant", "metric", "float32", "variant value", "kB", "speed-up"], body)


def edge_padding() -> str:
    """A row for each image size: speed-up by padded channels, in float32 and int8."""
    found = {(row["image"], row["variant"]): row for row in read_rows(RESULTS / "edge_padding.csv")}
    body = []
    for image in dict.fromkeys(image for image, _ in found):
        speeds = [found[image, precision] for precision in ("fp32", "int8")]
        body.append([image, *(f"{float(row['speed']):.2f} ± {float(row['speed_half_iqr']):.2f}" for row in speeds)])
    return markdown(["image", "float32", "int8"], body)


TABLES: dict[str, Callable[[], str]] = {"edge_variants": edge_variants, "edge_padding": edge_padding}
