"""Pages of sections: one file without scripts, and curves at their values."""

import re

from PIL import Image

from visionattn.page import CurvePoint, Curves, Section, draw_curves, write_pages

LOSS = {"training": [CurvePoint(0, 1.25), CurvePoint(1, 0.5)]}


def test_a_page_is_one_file_without_scripts_or_requests(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    curves = Curves("loss.svg", ["1", "2"], LOSS, "loss", percent=False)
    sections = [
        Section("<Cats & dogs>", ["`visionattn fit`", "a | b"], [["class", "n"], ["a|b", "<3>"]]),
        Section("Notes", ["one"]),
        Section("Pictures", curves=curves, pictures=[("a.png", "red")]),
    ]
    assert write_pages(sections, tmp_path) == ["loss.svg"]
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/png;base64"}
    assert "<h1>&lt;Cats &amp; dogs&gt;</h1>" in page
    assert "<code>visionattn fit</code>" in page
    assert (tmp_path / "loss.svg").read_text() in page
    assert "| a\\|b | <3> |" in (tmp_path / "report.md").read_text()


def test_values_that_are_no_shares_get_ticks_of_their_own():
    svg = draw_curves(["1", "2"], LOSS, "loss", percent=False)
    assert re.findall(r'text-anchor="end">([\d.]+)<', svg) == ["0.4", "0.6", "0.8", "1", "1.2", "1.4"]
    same = draw_curves(["1"], {"a": [CurvePoint(0, 0.5)]}, "loss", percent=False)
    assert "nan" not in same
    assert same.count("<circle") == 1
