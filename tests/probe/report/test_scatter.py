"""Accuracy against cost: points where they belong, names that do not lie on each other."""

import xml.dom.minidom
from itertools import combinations

import pytest

from visionattn.page import COLOURS
from visionattn.probe.report.scatter import ScatterPoint, draw_scatter
from visionattn.probe.statistics import Interval


def drawn(points):
    return xml.dom.minidom.parseString(draw_scatter(points, "cost < 1"))


def numbers(node, *names):
    return [float(node.getAttribute(name)) for name in names]


def test_cost_is_logarithmic_and_accuracy_linear():
    points = [
        ScatterPoint(f"net {place}", 10.0**place, 0.5 + place / 10, Interval(0.4, 0.9), True, place)
        for place in range(3)
    ]
    page = drawn(points)
    circles = page.getElementsByTagName("circle")
    by_colour = {circle.getAttribute("fill"): numbers(circle, "cx", "cy") for circle in circles}
    (x0, y0), (x1, y1), (x2, y2) = (by_colour[COLOURS[place]] for place in range(3))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y1 < y0  # upwards
    (line,) = page.getElementsByTagName("polyline")
    assert len(line.getAttribute("points").split()) == 3


@pytest.mark.parametrize("count", [1, 2, 12])
def test_names_do_not_lie_on_each_other(count):
    points = [
        ScatterPoint(f"a_long_name_of_network_{place}", 1.0 + 1e-3 * place, 0.8, Interval(0.7, 0.9), False, place)
        for place in range(count)
    ]
    names = [node for node in drawn(points).getElementsByTagName("text") if node.firstChild.data.startswith("a_long")]
    assert len(names) == count
    places = [numbers(node, "x", "y") for node in names]
    assert all(abs(y - other) >= 13.9 for (_, y), (_, other) in combinations(places, 2))
