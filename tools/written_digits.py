"""Ten digits drawn from strokes, the example of the demo page; no image of a data set is shipped."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

__all__ = ["digit_strip"]

Stroke = list[tuple[float, float]]

SIDE = 28  # pixels
WIDTH = 2.3  # of the pen, in pixels
ZOOM = 8  # subpixels per side of a pixel


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Points of an ellipse about (x, y), clockwise from one angle to another in degrees, 0 at its right."""
    angles = [math.radians(start + (end - start) * step / 24) for step in range(25)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


# Strokes of each digit, in pixels from the upper left corner of its square.
STROKES: list[list[Stroke]] = [
    [_arc(14, 14, 5, 8, 0, 360)],
    [[(14.5, 6), (13.5, 22)]],
    [[*_arc(14, 10, 5, 4.5, 190, 380), (9, 22), (20, 21.5)]],
    [_arc(13.5, 10, 4.5, 4, 200, 450) + _arc(13.5, 18, 5, 4.2, 270, 520)],
    [[(10, 6.5), (9, 14.5), (19, 14)], [(18, 6.5), (17, 22)]],
    [[(19, 6.5), (11, 6.5), (10.5, 13), *_arc(13.5, 17, 5, 4.8, 235, 500)]],
    [[(17, 6), (12, 11), *_arc(14, 17, 4.6, 4.8, 200, 560)]],
    [[(8.5, 7.5), (19, 7), (13, 22)]],
    [_arc(14, 10, 4, 3.8, 90, 450) + _arc(14, 18, 4.8, 4.3, 270, 630)],
    [[*_arc(13.5, 10.5, 4.3, 4.2, 0, 360), (17.8, 10.5), (16.5, 22)]],
]


def digit_strip() -> Image.Image:
    """The digits in a row, white on black: a grey image of 280 x 28 pixels."""
    strip = Image.new("L", (len(STROKES) * SIDE * ZOOM, SIDE * ZOOM))
    pen = ImageDraw.Draw(strip)
    for digit, strokes in enumerate(STROKES):
        for stroke in strokes:
            points = [((SIDE * digit + x) * ZOOM, y * ZOOM) for x, y in stroke]
            pen.line(points, 255, round(WIDTH * ZOOM), joint="curve")
            for x, y in (points[0], points[-1]):
                pen.circle((x, y), WIDTH * ZOOM / 2, 255)
    return strip.resize((len(STROKES) * SIDE, SIDE), Image.Resampling.BOX)
