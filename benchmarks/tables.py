"""Write the tables of the README and of the documentation from the CSV files in results/.

    python -m benchmarks.tables            # write them again
    python -m benchmarks.tables --check    # exit 1 where a page differs from its CSV

A page holds a table between `<!-- results: NAME -->` and `<!-- /results -->`. The tables
of a room are in its `tables.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

from benchmarks import headlines
from benchmarks.edge import tables as edge
from benchmarks.edge import variant_tables as edge_variants
from benchmarks.edge import web_tables as edge_web
from benchmarks.frozen import tables as frozen
from benchmarks.kernels import tables as kernels
from benchmarks.mixers import tables as mixers
from benchmarks.models import tables as models
from benchmarks.probe import tables as probe
from benchmarks.report import RESULTS
from benchmarks.retrieval import tables as retrieval
from benchmarks.shipped import tables as shipped
from benchmarks.stereo import tables as stereo
from benchmarks.super_resolution import tables as super_resolution
from benchmarks.train import tables as train

ROOT = RESULTS.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
ROOMS = (
    headlines,
    kernels,
    mixers,
    models,
    super_resolution,
    stereo,
    probe,
    retrieval,
    frozen,
    train,
    edge,
    edge_variants,
    edge_web,
    shipped,
)
TABLES: dict[str, Callable[[], str]] = {name: table for room in ROOMS for name, table in room.TABLES.items()}


def render(page: str) -> str:
    """A page with its tables rewritten."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in PAGES:
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new)
    print(f"{'Stale' if args.check else 'Written'}: {', '.join(stale) or 'none'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
