"""Count the costs of every model for `visionattn list`; run it after a model was added or changed.

python -m tools.count_costs
"""

from __future__ import annotations

import csv

from visionattn import models, zoo


def main() -> None:
    rows = [(name, *zoo.count(name)) for name in models.names()]
    with zoo.COSTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("name", *zoo.Cost._fields), *rows])


if __name__ == "__main__":
    main()
