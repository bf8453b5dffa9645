"""Stereo and optical-flow pairs with exact ground truth, generated from random scenes of surfaces.

A scene is a background of one to three planes (a wall, a floor), and objects before it: planes at all slants, curved
surfaces, thin bars, fences, rings and leaves, with textures of `visionattn.data.matching.textures` or photographs.
Some textures repeat, some have hardly any contrast, and some reflect a light at another depth than the surface. Both
views are drawn from the surfaces themselves (`visionattn.data.matching.surfaces`): disparities are continuous and
exact, the nearest surface occludes the others, and occlusion is computed, not estimated from the ground truth. A pixel
at an outline mixes two surfaces; its ground truth is that of the surface that covers more than half of it.

Then each view gets its own exposure, colours, blur, noise and 256 levels, and the right one of a stereo pair
can be shifted vertically and turned a little, as after an imperfect rectification: by less than a pixel or so. The
ground truth ignores this, as that of real datasets does.

Every sample is a function of seed, epoch and index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from visionattn.data.images import find_images
from visionattn.data.matching.pairs import MatchPair, matches_inside
from visionattn.data.matching.surfaces import FIRST, SECOND, SHAPES, Quadric, Seen, Shape, Surface, look, seen_by_other
from visionattn.data.matching.textures import POOL, level, lookup, photograph, procedural
from visionattn.data.samplers import SampleKey
from visionattn.errors import ConfigError

__all__ = ["GeneratedPairs", "Look", "Scene", "draw_scene", "photograph_views", "render"]

# Range of the relative variation of an object's disparity.
RELIEF = 0.5


@dataclass(frozen=True, eq=False)
class Look:
    """Appearance of a surface.

    Attributes:
        texture: (3, h, w) around 0.
        density: Texture pixels per pixel of the view, about one at most.
        angle: Angle between texture and surface.
        offset: Texture pixel at the origin, (2,).
        colours: (3, 3), contribution of each texture channel to RGB.
        base: RGB in 0..1.
        gradient: Change of brightness per pixel along a and b.
        glint: Strength of a reflected light; 0 for none.
        glint_place: Its centre on the surface, its radius, and its extra disparity beyond that of the surface.
    """

    texture: torch.Tensor
    density: float
    angle: float
    offset: tuple[float, float]
    colours: np.ndarray
    base: np.ndarray
    gradient: tuple[float, float]
    glint: float
    glint_place: tuple[float, float, float, float]

    def colour(self, a: np.ndarray, b: np.ndarray, s: float) -> np.ndarray:
        """RGB, about 0..1, of points as view s sees them: (N,), (N,) -> (3, N)."""
        cos, sin = np.cos(self.angle) * self.density, np.sin(self.angle) * self.density
        u, v = cos * a + sin * b + self.offset[0], cos * b - sin * a + self.offset[1]
        colour = self.base[:, None] + self.colours @ lookup(self.texture, u, v)
        colour *= 1 + np.clip(self.gradient[0] * a + self.gradient[1] * b, -0.5, 0.5)
        if self.glint:
            ga, gb, radius, apart = self.glint_place
            colour += self.glint * np.exp(-((a - ga + s * apart) ** 2 + (b - gb) ** 2) / (2 * radius**2))
        return colour


@dataclass(frozen=True, eq=False)
class Scene:
    """Surfaces and their appearance, one `Look` per surface; backgrounds first."""

    surfaces: Sequence[Surface]
    looks: Sequence[Look]


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    max_disparity: float,
    photographs: Sequence[Path] = (),
    flow: bool = False,
    thin: float = 0.0,
) -> Scene:
    """Draw a random scene.

    Args:
        rng: Random generator.
        size: Height and width of the views.
        max_disparity: Largest disparity, or length of motion, in pixels; many scenes stay below it.
        photographs: Image files to use as textures, next to procedural ones.
        flow: Move surfaces in two dimensions instead of showing depth.
        thin: Probability of an object to be a thin structure: a wire, a fence, a grid or foliage.
    """
    height, width = size
    reach = float(np.exp(rng.uniform(np.log(min(8.0, max_disparity)), np.log(max_disparity))))
    surfaces = _moving_background(rng, size, reach) if flow else _background(rng, size, reach)
    behind = surfaces[0].quadric[-1]
    scale = np.sqrt(height * width)
    for order in range(int(rng.integers(4, 24))):
        # Without thin structures nothing is drawn for them, so that scenes stay what they are.
        shape = _thin_shape(rng, scale) if thin and rng.random() < thin else _shape(rng, scale)
        margin = 0.5 * (0 if flow else reach)
        origin = np.array([rng.uniform(-margin, width + margin), rng.uniform(0, height)])
        if flow:
            surfaces.append(_moving(rng, origin, shape, reach, order + 1.0))
        else:
            near = behind + (reach / (1 + RELIEF) - behind) * rng.uniform() ** 1.3
            surfaces.append(Surface(origin, _relief(rng, shape, near), shape))
    return Scene(surfaces, [_look(rng, scale, photographs, surface.shape is None) for surface in surfaces])


def _background(rng: np.random.Generator, size: tuple[int, int], reach: float) -> list[Surface]:
    """A wall, often a floor, and sometimes a second wall: planes whose disparity is positive in both whole views."""
    height, width = size
    middle = np.array([width / 2, height / 2])
    wall = reach * rng.uniform(0.02, 0.5)
    # Keeps the disparity positive over half the view and what the other view sees beyond it.
    across, down = (wall * rng.uniform(-0.6, 0.6) * rng.uniform() / side for side in (width / 2 + reach, height))
    planes = [Surface(middle, (0, 0, 0, across, down, wall))]
    if rng.random() < 0.6:
        horizon = rng.uniform(0.2, 0.8) * height
        slope = (reach * rng.uniform(0.4, 1) - wall) / (height - horizon)
        planes.append(Surface(np.array([width / 2, horizon]), (0, 0, 0, 0, slope, wall)))
    if rng.random() < 0.3:
        edge = rng.uniform(0.2, 0.8) * width
        furthest = (width + reach) / 2 + abs(edge - width / 2)
        slope = rng.choice([-1, 1]) * (reach - wall) * rng.uniform(0.3, 1) / furthest
        planes.append(Surface(np.array([edge, height / 2]), (0, 0, 0, np.clip(slope, -0.8, 0.8), 0, wall)))
    return planes


def _relief(rng: np.random.Generator, shape: Shape, near: float) -> Quadric:
    """A, B, D, E, F, C of an object: flat, slanted or curved, but never so steep that a view sees its back."""
    r = shape.reach
    slant = rng.uniform(0, 0.5) if rng.random() < 0.7 else 0.0
    turn = rng.uniform(0, 2 * np.pi)
    bend = np.zeros(3)
    if rng.random() < 0.4:
        # A dome or a hollow, a cylinder, a saddle.
        forms = (np.array([1.0, 0, 1]), np.array([1.0, 0, 0]), rng.uniform(-1, 1, 3))
        bend = forms[rng.integers(3)] * rng.uniform(-0.25, 0.25) / r
    # A steep large object would exceed the disparity range, or reach behind the cameras.
    steepest = RELIEF * near / max(slant * r + np.abs(bend).sum() * r * r, 1e-6)
    slant, bend = slant * min(1, steepest), bend * min(1, steepest)
    A, B, D = map(float, bend)
    return A, B, D, slant * np.cos(turn), slant * np.sin(turn), near


def _moving_background(rng: np.random.Generator, size: tuple[int, int], reach: float) -> list[Surface]:
    middle = np.array([size[1] / 2, size[0] / 2])
    return [_moving(rng, middle, None, reach * rng.uniform(0, 0.7), 0.0, turn=reach / max(size))]


def _moving(
    rng: np.random.Generator, origin: np.ndarray, shape: Shape | None, reach: float, nearness: float, turn: float = 0.3
) -> Surface:
    """A surface that is shifted, turned, enlarged and, for an object, bent."""
    direction, angle = rng.uniform(0, 2 * np.pi, 2)
    length = reach * rng.uniform()
    rotation, zoom, *shear = rng.uniform(-turn, turn, 4) * rng.uniform()
    linear = np.array([[zoom + 0.3 * shear[0], -rotation], [rotation + 0.3 * shear[1], zoom]])
    bend = np.zeros(3)
    if shape is not None and rng.random() < 0.4:
        bend = rng.uniform(-0.1, 0.1, 3) / shape.reach
    shift = (length * np.cos(angle), length * np.sin(angle))
    A, B, D = map(float, bend)
    return Surface(
        origin, (A, B, D, 0.0, 0.0, 0.0), shape, (np.cos(direction), np.sin(direction)), linear, shift, nearness
    )


def _shape(rng: np.random.Generator, scale: float) -> Shape:
    """An outline: from a bar of two pixels to half of the view."""
    kind = str(rng.choice(SHAPES, p=(0.3, 0.15, 0.25, 0.06, 0.1, 0.14)))
    large = scale * rng.uniform(0.03, 0.35)
    half = (large, large * rng.uniform(0.3, 1))
    angle = rng.uniform(0, 2 * np.pi)
    numbers: tuple[tuple[float, ...], ...] = ()
    if kind == "box" and rng.random() < 0.35:
        half = (scale * rng.uniform(0.1, 0.5), rng.uniform(1, 4))
    elif kind == "box" and rng.random() < 0.5:
        angle = 0.0
    elif kind == "star":
        numbers = tuple((rng.uniform(0, 0.35) / k, rng.uniform(0, 2 * np.pi)) for k in range(2, 8))
    elif kind == "ring":
        numbers = ((max(2.0, half[1] * rng.uniform(0.1, 0.5)),),)
    elif kind == "fence":
        period = rng.uniform(6, 30)
        numbers = ((period, max(2.0, period * rng.uniform(0.15, 0.6))),)
        angle = rng.uniform(-0.3, 0.3)
    elif kind == "leaves":
        waves = rng.uniform((0, 0, 8), (2 * np.pi, 2 * np.pi, 50), (5, 3))
        numbers = tuple(tuple(map(float, wave)) for wave in waves)
    return Shape(kind, half, angle, numbers)


def _thin_shape(rng: np.random.Generator, scale: float) -> Shape:
    """An outline with parts of one to four pixels: a wire, a fence, a grid, or leaves of a few pixels."""
    kind = str(rng.choice(("box", "fence", "grid", "leaves")))
    half = (scale * rng.uniform(0.1, 0.5), scale * rng.uniform(0.1, 0.5))
    if kind == "box":
        return Shape(kind, (half[0], rng.uniform(0.5, 2)), rng.uniform(0, 2 * np.pi))
    if kind == "leaves":
        waves = rng.uniform((0, 0, 4), (2 * np.pi, 2 * np.pi, 16), (6, 3))
        return Shape(kind, half, rng.uniform(0, 2 * np.pi), tuple(tuple(map(float, wave)) for wave in waves))
    bars = tuple((rng.uniform(5, 25), rng.uniform(1, 4)) for _ in range(2 if kind == "grid" else 1))
    return Shape("fence", half, rng.uniform(-0.3, 0.3), bars)


def _look(rng: np.random.Generator, scale: float, photographs: Sequence[Path], background: bool) -> Look:
    picture = len(photographs) > 0 and rng.random() < (0.8 if background else 0.5)
    number = int(rng.integers(len(photographs) if picture else POOL))
    texture = photograph(photographs[number]) if picture else procedural(number)
    if picture:
        # From an image that fills a third of the view to one that is larger than the view.
        density = min(texture.shape[1:]) / (scale * rng.uniform(0.3, 1.5))
        contrast, mixed = rng.uniform(0.15, 0.28), 0.1
    else:
        density = float(np.exp(rng.uniform(np.log(0.3), np.log(3))))
        contrast, mixed = rng.uniform(0.05, 0.25), 1.0
    if rng.random() < 0.12:
        contrast *= rng.uniform(0, 0.1)
    texture, density = level(texture, density)
    colours = contrast * (np.eye(3) + mixed * rng.uniform(-0.5, 0.5, (3, 3)))
    base = rng.uniform(0.25, 0.75) + rng.uniform(-0.2, 0.2, 3)
    glint = rng.uniform(0.2, 0.7) if rng.random() < 0.12 else 0.0
    place = (*(0.1 * scale * rng.standard_normal(2)), scale * rng.uniform(0.02, 0.1), rng.uniform(-12, 12))
    offset = tuple(rng.uniform(0, texture.shape[1], 2))
    gradient = tuple(rng.uniform(-1, 1, 2) / scale)
    return Look(texture, density, rng.uniform(0, 2 * np.pi), offset, colours, base, gradient, glint, place)


def render(scene: Scene, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw both views as ideal cameras would.

    Returns:
        Views float32 (2, H, W, 3), about 0..1; fields float32 (2, H, W, 2); whether the other view sees each pixel,
        (2, H, W).
    """
    height, width = size
    y, x = (axis.ravel() for axis in np.mgrid[:height, :width].astype(np.float64))
    views, fields, seen = [], [], []
    for s in (FIRST, SECOND):
        found = look(scene.surfaces, x, y, s)
        view, field = _draw(scene, found, x, y, s)
        inside = np.flatnonzero(matches_inside(field.reshape(height, width, 2)))
        both = np.zeros(height * width, bool)
        both[inside] = seen_by_other(scene.surfaces, found.top[inside], x[inside], y[inside], field[inside], s)
        views.append(view.T.reshape(height, width, 3))
        fields.append(field.reshape(height, width, 2))
        seen.append(both.reshape(height, width))
    return np.stack(views), np.stack(fields).astype(np.float32), np.stack(seen)


def _draw(scene: Scene, found: Seen, x: np.ndarray, y: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:
    """Colours (3, N) and fields (N, 2) of a view."""
    view, field = np.zeros((3, len(x)), np.float32), np.zeros((len(x), 2))
    for number, (surface, appearance) in enumerate(zip(scene.surfaces, scene.looks)):
        for at, share in (
            (np.flatnonzero(found.top == number), None),
            (np.flatnonzero((found.second == number) & (found.weight > 0)), found.weight),
        ):
            if not len(at):
                continue
            a, b = surface.points(x[at], y[at], s)
            colour = appearance.colour(a, b, s)
            if share is None:
                field[at] = surface.field(a, b, s)
                view[:, at] += colour * (1 - found.weight[at])
            else:
                view[:, at] += colour * share[at]
    return view, field


class GeneratedPairs(Dataset):
    """Random scenes as `MatchPair`s; a sample is a function of seed, epoch and index, in any process.

    Args:
        length: Pairs per epoch.
        size: Height and width of the views.
        max_disparity: Largest disparity, or motion, in pixels.
        photographs: Folders of images to use as textures, next to procedural ones.
        flow: Generate pairs for optical flow.
        rectification: Largest vertical error of the right view in pixels, applied to half of the pairs; stereo only.
        seed: Seed of all random draws.
        thin: Probability of an object to be a thin structure.

    Raises:
        ConfigError: The largest disparity is not between 1 pixel and the width, or `thin` not between 0 and 1.
        DataError: A folder does not exist or holds no image.
    """

    def __init__(
        self,
        length: int,
        size: tuple[int, int],
        max_disparity: float,
        photographs: Sequence[str | Path] = (),
        flow: bool = False,
        rectification: float = 0.0,
        seed: int = 0,
        thin: float = 0.0,
    ) -> None:
        if not 0 <= thin <= 1:
            raise ConfigError(f"thin must be between 0 and 1; got {thin}.")
        if not 1 <= max_disparity <= size[1]:
            raise ConfigError(f"max_disparity must be between 1 and the width ({size[1]}); got {max_disparity}.")
        self.length = length
        self.size = size
        self.max_disparity = max_disparity
        self.photographs = [path for folder in photographs for path in find_images(folder)]
        self.flow = flow
        self.rectification = rectification
        self.seed = seed
        self.thin = thin

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey | int) -> MatchPair:
        sample, epoch, _ = key if isinstance(key, SampleKey) else SampleKey(key, epoch=0)
        rng = np.random.default_rng((self.seed, epoch, sample))
        scene = draw_scene(rng, self.size, self.max_disparity, self.photographs, self.flow, self.thin)
        views, fields, seen = render(scene, self.size)
        # Drawn in any case, so that the cameras do not depend on it.
        imperfect, (shift, slope) = rng.random() < 0.5, rng.uniform(-0.5, 0.5, 2) * self.rectification
        if imperfect and self.rectification and not self.flow:
            views[1] = _turned(views[1], shift, slope)
        return MatchPair(photograph_views(views, rng), fields, seen)


def _turned(view: np.ndarray, shift: float, slope: float) -> np.ndarray:
    """Move each column down by `shift`, plus `slope` at the right edge and minus it at the left: (H, W, 3), pixels."""
    height, width = view.shape[:2]
    x = torch.linspace(-1, 1, width)
    y = torch.arange(height)[:, None] - (shift + slope * x)
    grid = torch.stack([x.expand(height, width), y * (2 / (height - 1)) - 1], -1)
    image = torch.from_numpy(view).permute(2, 0, 1)[None]
    found = F.grid_sample(image, grid[None], mode="bicubic", padding_mode="border", align_corners=True)
    return found[0].permute(1, 2, 0).numpy()


def photograph_views(views: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Simulate two cameras: identical in half of the pairs, different in the others.

    Args:
        views: float32 (2, H, W, 3), about 0..1.
        rng: Random generator of the cameras.

    Returns:
        uint8 (2, H, W, 3), after exposure, colours, gamma, blur and noise.
    """
    apart = 1.0 if rng.random() < 0.5 else 0.1
    exposure = np.exp(rng.normal(0, 0.12) + apart * rng.normal(0, 0.06, (2, 1, 1, 1)))
    tint = np.exp(0.06 * rng.standard_normal(3) + apart * rng.normal(0, 0.03, (2, 1, 1, 3)))
    gamma = np.exp(rng.normal(0, 0.15) + apart * rng.normal(0, 0.04, (2, 1, 1, 1)))
    grey = views.mean(-1, keepdims=True)
    views = grey + np.float32(rng.uniform(0.1, 1)) * (views - grey)
    pictures = np.clip(views * (exposure * tint).astype(np.float32), 0, 1) ** gamma.astype(np.float32)
    blur = rng.uniform(0, 1) + apart * rng.uniform(0, 0.5, 2) if rng.random() < 0.3 else np.zeros(2)
    pictures = np.stack([_blurred(picture, sigma) for picture, sigma in zip(pictures, blur)])
    noise = rng.uniform(0, 0.03) * rng.uniform(1 - 0.5 * apart, 1, (2, 1, 1, 1))
    pictures += rng.standard_normal(pictures.shape, np.float32) * noise.astype(np.float32)
    return np.clip(np.rint(255 * pictures), 0, 255).astype(np.uint8)


def _blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    if sigma < 0.3:
        return picture
    at = torch.arange(-3, 4)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, 7)
    image = F.pad(torch.from_numpy(picture).permute(2, 0, 1)[None], (3, 3, 3, 3), mode="replicate")
    image = F.conv2d(F.conv2d(image, weights, groups=3), weights.transpose(2, 3), groups=3)
    return image[0].permute(1, 2, 0).numpy()
