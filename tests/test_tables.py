"""The tables of the README and of the documentation are those of the CSV files."""

import re

import pytest

from benchmarks.report import RESULTS, read_rows
from benchmarks.tables import BLOCK, TABLES, render
from benchmarks.tables import PAGES as ALL_PAGES

PAGES = [path for path in ALL_PAGES if BLOCK.search(path.read_text())]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_is_up_to_date(path):
    page = path.read_text()
    assert render(page) == page


def test_every_table_stands_somewhere():
    names = {name for path in PAGES for name in re.findall(r"<!-- results: (\w+) -->", path.read_text())}
    assert names == set(TABLES)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_rows_say_where_they_come_from(path):
    for row in read_rows(path):
        assert {"device", "torch", "git_revision", "date"} <= {key for key, value in row.items() if value}
