r"""Surfaces whose position in two views has a closed form, and which of them each view sees.

A middle view lies between the views, at s = 0. A surface is a function m of two coordinates (a, b) in pixels around its
origin o there, along orthogonal unit vectors e and n. View s (1/2 the left or first, -1/2 the right or second) shows
its point (a, b) at

    p = o + w + s (L w + t)         w = (a + s m(a, b)) e + b n         m = A a^2 + B a b + D b^2 + E a + F b + C

In stereo e = (1, 0), L = 0 and t = 0, so that m is the disparity, half of which applies to each view: quadratic in the
pixels of the middle view for planes (A = B = D = 0) and curved surfaces. In optical flow m bends the motion of the
surface, whose affine part is L and t. Conversely, from a pixel of view s to the surface,

    [alpha, b] = [e, n]^T (I + s L)^-1 (p - o - s t)
    a = 2 (alpha - s c) / (g + sqrt(g^2 + 4 s A (alpha - s c)))     g = 1 + s (B b + E), c = D b^2 + F b + C

the root that faces the view, also for A = 0; where the argument of the square root is not positive, the view does not
see the surface. The match of a pixel is the position of its point in the other view: exact, with no search.

A shape says which points belong to the surface, by a signed distance in (a, b). Of the surfaces at a pixel the view
sees the nearest: in stereo that of the largest disparity, in flow that of the largest `nearness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["FIRST", "SECOND", "SHAPES", "Quadric", "Seen", "Shape", "Surface", "look", "seen_by_other"]

FIRST, SECOND = 0.5, -0.5
Quadric = tuple[float, float, float, float, float, float]
SHAPES = ("box", "ellipse", "star", "ring", "fence", "leaves")


@dataclass(frozen=True)
class Shape:
    """Which points (a, b) belong to a surface, by a signed distance in pixels, positive inside.

    Attributes:
        kind: One of `SHAPES`.
        half: Half the sizes along the shape's own axes, in pixels.
        angle: Angle between these axes and those of the surface.
        numbers: star: amplitude and phase of waves of the radius, from the second on. ring: width in pixels. fence:
            period and width of its bars in pixels, then those of bars across them, if any. leaves: direction, phase and
            wavelength in pixels of each wave.
    """

    kind: str
    half: tuple[float, float]
    angle: float = 0.0
    numbers: tuple[tuple[float, ...], ...] = ()

    @property
    def reach(self) -> float:
        """Largest distance of a point from the origin."""
        waves = 1 + sum(abs(wave[0]) for wave in self.numbers) if self.kind == "star" else 1.0
        return waves * float(np.hypot(*self.half))

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Signed distance of points from the outline, approximate far from it, in the shape of a and b."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        u, v = cos * a + sin * b, cos * b - sin * a
        hu, hv = self.half
        if self.kind in ("box", "fence"):
            inside = np.minimum(hu - np.abs(u), hv - np.abs(v))
            if self.kind == "fence":
                bars = [
                    width / 2 - np.abs((at + period / 2) % period - period / 2)
                    for at, (period, width) in zip((u, v), self.numbers)
                ]
                inside = np.minimum(inside, np.maximum.reduce(bars))
            return inside
        radius = np.hypot(u / hu, v / hv)
        if self.kind == "star":
            # Waves of the angle are powers of the direction as a complex number.
            turn = (u / hu + 1j * v / hv) / np.maximum(radius, 1e-9)
            power, outline = turn, np.ones_like(radius)
            for size, phase in self.numbers:
                power = power * turn
                outline += size * (np.cos(phase) * power.real - np.sin(phase) * power.imag)
            return (outline - radius) * min(hu, hv)
        if self.kind == "ring":
            ((width,),) = self.numbers
            return width / 2 - np.abs((1 - radius) * min(hu, hv) - width / 2)
        inside = (1 - radius) * min(hu, hv)
        if self.kind == "leaves":
            height, slope = np.zeros_like(a), 0.0
            for direction, phase, wavelength in self.numbers:
                frequency = 2 * np.pi / wavelength
                height += np.sin(frequency * (np.cos(direction) * u + np.sin(direction) * v) + phase)
                slope += frequency**2 / 2
            inside = np.minimum(inside, height / np.sqrt(slope))
        return inside


@dataclass(frozen=True, eq=False)
class Surface:
    """A surface in both views (equations: see the module).

    Attributes:
        origin: o in pixels of the middle view, (2,), x first.
        quadric: A, B, D, E, F, C.
        shape: Which points belong to it; None is all of them, for a background.
        direction: e, a unit vector.
        linear: L, (2, 2).
        shift: t in pixels, (2,).
        nearness: Decides which of several surfaces is seen; None uses m.
    """

    origin: np.ndarray
    quadric: Quadric
    shape: Shape | None = None
    direction: tuple[float, float] = (1.0, 0.0)
    linear: np.ndarray | None = None
    shift: tuple[float, float] = (0.0, 0.0)
    nearness: float | None = None

    def m(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Displacement of points between the views along e, in pixels."""
        A, B, D, E, F, C = self.quadric
        return (A * a + B * b + E) * a + (D * b + F) * b + C

    def near(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Nearness of points, comparable only with those of other surfaces."""
        return self.m(a, b) if self.nearness is None else np.full_like(a, self.nearness)

    def points(self, x: np.ndarray, y: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:
        """The points (a, b) that view s shows at pixels (x, y); NaN where there is none."""
        A, B, D, E, F, C = self.quadric
        x, y = x - (self.origin[0] + s * self.shift[0]), y - (self.origin[1] + s * self.shift[1])
        if self.linear is not None:
            inverse = np.linalg.inv(np.eye(2) + s * self.linear)
            x, y = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
        ex, ey = self.direction
        alpha, b = ex * x + ey * y, ex * y - ey * x
        g, rest = 1 + s * (B * b + E), alpha - s * ((D * b + F) * b + C)
        root = g * g + 4 * s * A * rest
        with np.errstate(invalid="ignore", divide="ignore"):
            below = g + np.sqrt(np.where(root > 0, root, np.nan))
            return np.where(below > 1e-6, 2 * rest / below, np.nan), b

    def field(self, a: np.ndarray, b: np.ndarray, s: float) -> np.ndarray:
        """Position of points in the other view minus that in view s, (..., 2) in pixels, x first."""
        m = self.m(a, b)
        (ex, ey), (tx, ty) = self.direction, self.shift
        x, y = -2 * s * (m * ex + tx), -2 * s * (m * ey + ty)
        if self.linear is not None:
            # s' L w' - s L w of s' = -s, where w + w' = 2 (a e + b n).
            middle_x, middle_y = 2 * (a * ex - b * ey), 2 * (a * ey + b * ex)
            x = x - s * (self.linear[0, 0] * middle_x + self.linear[0, 1] * middle_y)
            y = y - s * (self.linear[1, 0] * middle_x + self.linear[1, 1] * middle_y)
        return np.stack([x, y], -1)

    def around(self, x: np.ndarray, y: np.ndarray, s: float) -> np.ndarray:
        """Indices of the pixels (N,) at which view s may see the surface."""
        if self.shape is None:
            return np.arange(len(x))
        A, B, D, E, F, C = self.quadric
        r = self.shape.reach + 1  # the outline is blended over half a pixel
        bend = abs(s) * ((abs(A) + abs(B) + abs(D)) * r * r + (abs(E) + abs(F)) * r)
        reach = (r + bend) * (1 + (abs(s) * np.linalg.norm(self.linear, 2) if self.linear is not None else 0))
        centre = s * C * np.array(self.direction)
        if self.linear is not None:
            centre = centre + s * self.linear @ centre
        cx, cy = self.origin + centre + s * np.array(self.shift)
        return np.flatnonzero((np.abs(x - cx) <= reach) & (np.abs(y - cy) <= reach))


class Seen(NamedTuple):
    """The surfaces that a view sees at N pixels.

    Attributes:
        top: Index of the nearest surface, (N,).
        second: Index of the surface blended with it at an outline.
        weight: Weight of the second one in the pixel, up to 1/2, 0 away from outlines.
    """

    top: np.ndarray
    second: np.ndarray
    weight: np.ndarray


def look(surfaces: Sequence[Surface], x: np.ndarray, y: np.ndarray, s: float) -> Seen:
    """Find the nearest surface at pixels (N,) of view s; one of the surfaces must be a background."""
    near, near_second = np.full((2, len(x)), -np.inf)
    top, second = np.zeros((2, len(x)), np.int16)
    cover = np.ones(len(x))
    fringes = []
    for number, surface in enumerate(surfaces):
        at = surface.around(x, y, s)
        if not len(at):
            continue
        a, b = surface.points(x[at], y[at], s)
        there = np.isfinite(a)
        at, a, b = at[there], a[there], b[there]
        inside = np.full_like(a, np.inf) if surface.shape is None else surface.shape.distance(a, b)
        keep = inside > -0.5
        at, inside, height = at[keep], inside[keep], surface.near(a[keep], b[keep])
        covers = inside >= 0
        fringes.append((at[~covers], 0.5 + inside[~covers], height[~covers], number))
        at, inside, height = at[covers], inside[covers], height[covers]
        wins = height > near[at]
        won = at[wins]
        second[won], near_second[won] = top[won], near[won]
        top[won], near[won], cover[won] = number, height[wins], np.minimum(0.5 + inside[wins], 1)
        lost, height = at[~wins], height[~wins]
        behind = height > near_second[lost]
        second[lost[behind]], near_second[lost[behind]] = number, height[behind]
    weight = np.where(np.isfinite(near_second), 1 - cover, 0)
    for at, share, height, number in fringes:
        before = (height > near[at]) & (share > weight[at])
        second[at[before]], weight[at[before]] = number, share[before]
    return Seen(top, second, weight)


def seen_by_other(
    surfaces: Sequence[Surface], top: np.ndarray, x: np.ndarray, y: np.ndarray, fields: np.ndarray, s: float
) -> np.ndarray:
    """Which pixels of view s the other view sees too.

    Args:
        surfaces: All of them.
        top: The nearest surface at each pixel, (N,).
        x: Columns of the pixels, (N,).
        y: Rows of the pixels, (N,).
        fields: Positions of their matches relative to them, (N, 2).
        s: The view.

    Returns:
        bool (N,): the other view has the same surface nearest at the match. Whether the match lies within the image
        is not checked.
    """
    return look(surfaces, x + fields[:, 0], y + fields[:, 1], -s).top == top
