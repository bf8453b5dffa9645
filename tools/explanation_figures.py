"""Draw the figures of the explanation pages, docs/blocks/*.svg and others, of what the library's own code computes.

    python -m tools.explanation_figures [halo match_attention ...]

Photographs are Chelsea, the cat of scikit-image (CC0).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from tools.drawing import APRICOT, BLUE, GREY, INK, ORANGE, PALE, WIDTH, Canvas
from tools.front_pictures import looked_at
from tools.striped_scenes import trained_maps
from visionattn.arena.nets import create_mixer
from visionattn.blocks import HaloAttention, MinimalAttention, SubspaceAttention
from visionattn.blocks.dual_cross import roll_out, select_local
from visionattn.frozen import Call
from visionattn.frozen.policies import Window
from visionattn.frozen.tiles import tiling

DOCS = Path(__file__).parents[1] / "docs"
LARGEST = 40_000  # bytes of a file


def reached(function: Callable[[Tensor], Tensor], x: Tensor, y: int, column: int, draws: int = 8) -> Tensor:
    """How much the output (1, C, H, W) at a position depends on each position of the input, (H, W)."""
    x = x.clone().requires_grad_()
    out = function(x)[0, :, y, column]
    total = torch.zeros(x.shape[-2:])
    for _ in range(draws):
        (grad,) = torch.autograd.grad(out @ torch.randn_like(out), x, retain_graph=True)
        total += grad[0].square().sum(0)
    return total.sqrt()


def halo() -> Canvas:
    """The keys that two blocks of queries read: where the outputs' gradient is not zero."""
    block, border, side, cell = 4, 2, 12, 14
    layer = HaloAttention(8, num_heads=2, block_size=block, halo_size=border)
    canvas = Canvas("A block of queries and its window of keys, inside a map and at its corner", 246)
    for left, at, words in ((16, 4, "inside the map"), (216, 0, "at a corner")):
        read = reached(layer, torch.randn(1, 8, side, side), at, at) > 0
        top, window = 40, (block + 2 * border) * cell
        corner = left + (at - border) * cell, top + (at - border) * cell
        canvas.box(*corner, window, window, APRICOT)
        canvas.box(left, top, side * cell, side * cell, "#ffffff")
        for y, x in read.nonzero().tolist():
            inside = at <= y < at + block and at <= x < at + block
            canvas.box(left + x * cell, top + y * cell, cell, cell, BLUE if inside else PALE)
        for n in range(side + 1):
            width = 0.4 if n % block else 1.6
            canvas.line([(left + n * cell, top), (left + n * cell, top + side * cell)], GREY, width)
            canvas.line([(left, top + n * cell), (left + side * cell, top + n * cell)], GREY, width)
        canvas.box(*corner, window, window, stroke=ORANGE, dash="4 3", line=2)
        canvas.label(left + side * cell / 2, 230, words)
    return canvas


def match_attention() -> Canvas:
    """The weights of the keys around a real-valued centre, for keys that are all equally similar."""
    u, v, radius, cell = 0.3, 0.6, 1, 44
    side = 2 * radius + 2
    q = torch.zeros(1, 8, 8, 1, 4)
    field = torch.tensor([u, v]).expand(1, 8, 8, 1, 2)
    _, weights = torch.ops.visionattn.match_attention(q, q, q, field, radius, "l1")
    weights = weights[0, 3, 3, 0].view(side, side)
    canvas = Canvas("The 16 keys around a match and the four sub-windows that share them", 270)
    left, top = 12, 34
    for y in range(side):
        for x in range(side):
            share = float(weights[y, x] / weights.max())
            canvas.heat(left + x * cell, top + y * cell, cell, cell, [[share * 0.6]], 0, 1)
            canvas.label(left + (x + 0.5) * cell, top + (y + 0.5) * cell + 5, f"{100 * weights[y, x]:.1f} %", size=12)
    canvas.label(left + side * cell / 2, 22, "weights A of equal keys")
    centre = left + (radius + 0.5 + u) * cell, top + (radius + 0.5 + v) * cell
    canvas.dot(*centre, 5)
    canvas.text(left, top + side * cell + 22, "● match c = n + (u, v), u = 0.3, v = 0.6", fill=ORANGE)
    canvas.text(left, top + side * cell + 42, "each sub-window of 3 × 3 keys has a softmax of its own", size=13)
    small = 17
    for n, (dy, dx, share) in enumerate(
        ((0, 0, (1 - u) * (1 - v)), (0, 1, u * (1 - v)), (1, 0, (1 - u) * v), (1, 1, u * v))
    ):
        x, y = 212 + n % 2 * 96, top + n // 2 * 92
        canvas.box(x + dx * small, y + dy * small, 3 * small, 3 * small, PALE)
        for line in range(side + 1):
            canvas.line([(x + line * small, y), (x + line * small, y + side * small)], GREY, 0.5)
            canvas.line([(x, y + line * small), (x + side * small, y + line * small)], GREY, 0.5)
        canvas.box(x + dx * small, y + dy * small, 3 * small, 3 * small, stroke=ORANGE, line=2)
        canvas.label(x + 2 * small, y + 5 * small - 1, f"w = {share:.2f}")
    canvas.label(302, 22, "four sub-windows")
    return canvas


def efficient_probing() -> Canvas:
    """Both orders of operations, sizes to scale, with their multiply-accumulates."""
    tokens, dim, queries = 196, 768, 32
    first = (2 * tokens * dim * dim + 2 * queries * tokens * dim + 2 * tokens * dim) / 1e6
    last = (4 * queries * tokens * dim + 2 * dim * dim) / 1e6
    canvas = Canvas("Two orders of operations: project all tokens, or average them first", 300)
    tall, wide, short = tokens / 2.2, dim / 8.5, queries / 2.2
    rows = (
        (26, "values first", first, tall, "196 × 768", "values X W"),
        (162, "averages first", last, short, "32 × 768", "averages A X"),
    )
    for top, name, cost, height, size, words in rows:
        middle = top + 14 + tall / 2
        canvas.text(8, top, name, bold=True)
        canvas.text(WIDTH - 8, top, f"{cost:.1f} million operations", "end", ORANGE)
        canvas.box(8, top + 14, wide, tall, PALE, GREY)
        canvas.label(8 + wide / 2, middle - 4, "tokens X")
        canvas.label(8 + wide / 2, middle + 14, "196 × 768")
        canvas.arrow((8 + wide + 4, middle), (8 + wide + 46, middle))
        canvas.label(8 + wide + 24, middle - 8, "W" if height == tall else "A")
        left = 8 + wide + 52
        canvas.box(left, middle - height / 2, wide, height, APRICOT, GREY)
        canvas.label(left + wide / 2, middle + (-4 if height == tall else -height / 2 - 8), words)
        canvas.label(left + wide / 2, middle + (14 if height == tall else height / 2 + 18), size)
        canvas.arrow((left + wide + 4, middle), (left + wide + 46, middle))
        canvas.label(left + wide + 24, middle - 8, "A" if height == tall else "W")
        canvas.box(left + wide + 52, middle - 4, 72, 8, BLUE)
        canvas.label(left + wide + 88, middle + 22, "y: 768")
    canvas.text(8, 288, "Softmax weights A: one row per query, 32 × 196", fill=GREY)
    return canvas


def minimal() -> Canvas:
    """The matrices that are left of self-attention's four, and their parameters at C = 192."""
    cases = (
        ("four projections", "pair", "projected", "qkvo"), ("shared queries and keys", "shared", "projected", "qvo"),
        ("shared, no values", "shared", "identity", "q"), ("collapsed, no values", "collapsed", "identity", "w"),
        ("symmetric, no values", "symmetric", "identity", "t"),
    )  # fmt: skip
    names = {"q": "Q", "k": "K", "v": "V", "o": "O", "w": "W", "t": "T"}
    canvas = Canvas("The weight matrices of five forms of self-attention, with their parameters", 262)
    for row, (words, similarity, values, matrices) in enumerate(cases):
        layer = MinimalAttention(192, similarity=similarity, values=values, bias=False)
        count = sum(parameter.numel() for parameter in layer.parameters())
        top = 12 + 49 * row
        canvas.text(8, top + 25, words)
        for n, matrix in enumerate(matrices):
            left = 172 + 43 * n
            if matrix == "t":
                path = [(left, top), (left, top + 38), (left + 38, top + 38), (left, top)]
                canvas.parts.append(
                    f'<path d="M{"L".join(f"{x} {y}" for x, y in path)}z" fill="{PALE}" stroke="{GREY}"/>'
                )
            else:
                canvas.box(left, top, 38, 38, PALE if matrix in "qkw" else APRICOT, GREY)
            canvas.label(left + (13 if matrix == "t" else 19), top + (31 if matrix == "t" else 24), names[matrix])
        canvas.text(WIDTH - 8, top + 25, f"{count:,}", "end")
    return canvas


def symmetric_gate() -> Canvas:
    """The factor and the gated output, from the operator, without an input x and with x = 1."""
    h = torch.linspace(-6, 6, 121)
    canvas = Canvas("The gate's factor and its output as functions of h", 250)
    left, middle, across, up = 36, 150, 27, 40
    for value in (-0.5, 0.0, 0.5, 1.0, 2.0, 3.0):
        y = middle - value * up
        canvas.line([(left, y), (left + 12 * across, y)], GREY, 0.9 if value == 0 else 0.4)
        canvas.text(left - 6, y + 4, f"{value:g}", "end", GREY, 12)
    for value in (-6, -3, 0, 3, 6):
        canvas.label(left + (value + 6) * across, middle + 42, f"{value}", GREY, 12)
    ones = torch.ones_like(h)
    factor = torch.ops.visionattn.symmetric_gate(h, ones - h)  # (h + x) = 1
    curves = (
        (factor, ORANGE, "σ(h) − ½"),
        (torch.ops.visionattn.symmetric_gate(h, 0 * h), BLUE, "out, x = 0"),
        (torch.ops.visionattn.symmetric_gate(h, ones), INK, "out, x = 1"),
    )
    for n, (curve, colour, words) in enumerate(curves):
        points = [(left + (float(a) + 6) * across, middle - float(b) * up) for a, b in zip(h, curve)]
        dash = "5 3" if colour == INK else ""
        canvas.line(points, colour, 2, dash)
        canvas.line([(30 + 122 * n, 226), (52 + 122 * n, 226)], colour, 3, dash)
        canvas.text(58 + 122 * n, 230, words)
    canvas.label(left + 6 * across, middle + 58, "h", GREY)
    return canvas


def span() -> Canvas:
    """Three convolutions and the gate, and what the gate lets pass of a photograph."""
    canvas = Canvas("The steps of SPAN's block, and the size of its gate's factor over a photograph", 300)
    steps = ("x", "conv 1", "SiLU", "conv 2", "SiLU", "conv 3", "h")
    y, x = 40, 8
    for n, step in enumerate(steps):
        width = 24 if len(step) == 1 else 52
        canvas.box(x, y - 15, width, 30, APRICOT if step == "SiLU" else PALE, GREY, round=4)
        canvas.label(x + width / 2, y + 5, step)
        if n + 1 < len(steps):
            canvas.arrow((x + width, y), (x + width + 12, y))
        x += width + 13
    canvas.arrow((20, y + 15), (20, 92), (150, 92))
    canvas.arrow((x - 25, y + 15), (x - 25, 92), (312, 92))
    canvas.box(151, 76, 160, 32, APRICOT, GREY, round=4)
    canvas.label(231, 97, "(h + x) · (σ(h) − ½)")
    canvas.arrow((231, 108), (231, 130))
    canvas.label(231, 146, "O")
    photograph = Image.fromarray(data.chelsea()).crop((120, 60, 345, 210))
    network = timm.create_model("va_span_ch26_x4", pretrained=True).eval()
    found: list[Tensor] = []
    handle = network.blocks[2].conv3.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.inference_mode():
        network(torch.from_numpy(np.asarray(photograph) / 255).float().permute(2, 0, 1)[None])
    handle.remove()
    factor = (found[0].sigmoid() - 0.5).abs().mean(1)[0]
    canvas.photograph(8, 160, 189, 126, photograph)
    canvas.heat(203, 160, 189, 126, factor)
    return canvas


def subspace() -> Canvas:
    """Maps of four subspaces of a network's features, and the range of their multipliers at two sizes."""
    photograph = Image.fromarray(data.chelsea()).crop((90, 0, 390, 300))
    network = timm.create_model("va_span_ch26_x4", pretrained=True).eval()
    pixels = torch.from_numpy(np.asarray(photograph) / 255).float().permute(2, 0, 1)[None]
    torch.manual_seed(1)
    gates = {name: SubspaceAttention(24, 4, gain=name).eval() for name in ("paper", "scaled")}
    gates["scaled"].load_state_dict(gates["paper"].state_dict())
    canvas = Canvas("Maps of four subspaces over a photograph, and the range of the multiplier", 300)
    canvas.photograph(8, 30, 72, 72, photograph)
    canvas.label(44, 22, "photograph")
    canvas.label(246, 22, "A of four subspaces, each sums to 1")
    ranges = []
    with torch.inference_mode():
        features = network.conv_1(network.norm(pixels))[:, :24]
        for side in (14, 56):
            x = torch.nn.functional.adaptive_avg_pool2d(features, side)
            for name, gate in gates.items():
                factor = (gate(x) / x)[0, ::6]
                ranges.append((f"{name}, {side} × {side}", float(factor.min()), float(factor.max())))
                if name == "paper" and side == 14:
                    for n, values in enumerate(factor):
                        canvas.heat(92 + 77 * n, 30, 72, 72, values)
    canvas.text(8, 136, "x is multiplied by, from the lowest to the highest position:")
    left, scale = 126, 252 / math.log(max(high for *_, high in ranges))
    for n, (words, low, high) in enumerate(ranges):
        y = 164 + 30 * n
        canvas.text(8, y + 4, words)
        canvas.line([(left, y), (left + 254, y)], GREY, 0.4)
        canvas.line([(left + scale * math.log(low), y), (left + max(scale * math.log(high), 2), y)], BLUE, 7)
        canvas.text(
            left + 254, y - 6, f"{low:.4f} to {high:.4f}" if high < 1.5 else f"{low:.2f} to {high:.2f}", "end", GREY, 12
        )
    canvas.label(left, 286, "1", GREY, 12)
    canvas.text(left + 254, 286, "logarithmic", "end", GREY, 12)
    return canvas


def _heated(photograph: Image.Image, weights: Tensor, grid: tuple[int, int]) -> Image.Image:
    """A photograph in grey, with weights (N,) over it in red."""
    share = ((weights - weights.min()) / (weights.max() - weights.min())).view(1, 1, *grid)
    mask = torch.nn.functional.interpolate(share, size=photograph.size[::-1], mode="bilinear")[0, 0]
    colour = Image.new("RGB", photograph.size, "#d7301f")
    grey = photograph.convert("L").convert("RGB")
    return Image.composite(colour, grey, Image.fromarray((230 * mask).byte().numpy()))


def _attention(call: Call) -> Tensor:
    """Mean over heads of a layer's attention, (N, N)."""
    return (call.q[0] @ call.k[0].mT * call.scale).softmax(-1).mean(0)


def dual_cross() -> Canvas:
    """Roll-out of a trained transformer over a photograph, and the patches that GLCA would query."""
    photograph, calls = looked_at()
    grid = calls[-1].grid
    r = roll_out([_attention(call)[None] for call in calls])
    count = r.shape[1] // 16
    index = torch.arange(r.shape[1], dtype=torch.float32).view(1, -1, 1)
    chosen = select_local(index, r, count)[0, 1:, 0].long() - calls[-1].prefix
    canvas = Canvas("Roll-out of attention over a photograph, and the patches selected by it", 168)
    width, height = 188, 188 * 2 / 3
    canvas.photograph(8, 32, width, height, _heated(photograph, r[0, calls[-1].prefix :], grid))
    canvas.photograph(204, 32, width, height, photograph)
    for patch in chosen.tolist():
        y, x = divmod(patch, grid[1])
        canvas.box(
            204 + x * width / grid[1],
            32 + y * height / grid[0],
            width / grid[1],
            height / grid[0],
            stroke="#17becf",
            line=1.6,
        )
    canvas.label(8 + width / 2, 22, "roll-out r")
    canvas.label(204 + width / 2, 22, f"{count} of {r.shape[1] - 1} patches, R")
    return canvas


def conditional() -> Canvas:
    """Maps of two conditions, trained to tell a disc's colour and the direction of stripes."""
    images, maps, accuracy = trained_maps(3)
    print(f"conditional: {accuracy:.0%} of labels are right")
    canvas = Canvas("Three images, and where each of two conditions attends in them", 410)
    for column, words in enumerate(("image", "colour of the disc", "stripes")):
        canvas.label(70 + 130 * column, 22, words)
    for row in range(3):
        top = 34 + 124 * row
        pixels = (255 * images[row].permute(1, 2, 0)).byte().numpy()
        canvas.photograph(12, top, 116, 116, Image.fromarray(pixels))
        for column in range(2):
            canvas.heat(142 + 130 * column, top, 116, 116, maps[row, column])
    return canvas


MIXED = ("softmax", "mean", "identity", "window", "hsa", "pool3x3", "agent", "softmax_conv", "halo")


def mixers() -> Canvas:
    """Which tokens an output depends on, untrained: the gradient of one token's output."""
    side, at = 14, (6, 9)
    canvas = Canvas("Nine mixers: the tokens on which the output at one position depends", 446)
    for n, name in enumerate(MIXED):
        torch.manual_seed(0)
        mixer = create_mixer(name, 32, 2, (side, side), small=False)

        def through(x: Tensor, mixer=mixer) -> Tensor:
            return mixer(x.flatten(2).mT, (side, side)).mT.unflatten(2, (side, side))

        found = reached(through, 2 * torch.randn(1, 32, side, side), *at).sqrt()
        x, y = 14 + 130 * (n % 3), 30 + 140 * (n // 3)
        canvas.heat(x, y, 112, 112, found, low=0)
        cell = 112 / side
        canvas.box(x + at[1] * cell, y + at[0] * cell, cell, cell, stroke=ORANGE, line=1.8)
        canvas.label(x + 56, y - 8, name)
    return canvas


def frozen() -> Canvas:
    """Where the class token of a frozen transformer looks, at four layers."""
    photograph, calls = looked_at()
    count = len(calls)
    canvas = Canvas("Attention of the class token over a photograph, at four layers", 318)
    width, height = 188, 188 * 2 / 3
    for n in range(4):
        call = calls[(n + 1) * count // 4 - 1]
        weights = _attention(call)[0, call.prefix :]
        x, y = 8 + 196 * (n % 2), 28 + 152 * (n // 2)
        canvas.photograph(x, y, width, height, _heated(photograph, weights, call.grid))
        largest = float(weights.max()) * weights.shape[0]
        canvas.label(x + width / 2, y - 8, f"layer {(n + 1) * count // 4}: at most {largest:.1f} / N")
    return canvas


def frozen_policies() -> Canvas:
    """The key tiles that one query tile reads under the policy `window`."""
    grid, cell = (32, 48), 8
    policy = Window(budget=0.125)
    q = torch.zeros(1, 1, grid[0] * grid[1], 1)
    index = policy(q, q, grid, 0, {})
    queries, keys = tiling(grid, policy.query_tile), tiling(grid, policy.key_tile)
    tile = queries.shape[1] + 3
    canvas = Canvas("A query tile, the key tiles that it reads and the pooled ones", 322)
    left, top = 8, 8
    read = set(index[0, 0, tile].tolist())
    for number in range(len(keys.table)):
        y, x = divmod(number, keys.shape[1])
        size = policy.key_tile * cell
        canvas.box(left + x * size, top + y * size, size, size, PALE if number in read else "#ffffff", GREY, line=0.8)
        if number in read:
            for n in range(policy.key_tile**2):
                canvas.dot(left + x * size + (n % 4 + 0.5) * cell, top + y * size + (n // 4 + 0.5) * cell, 2, BLUE)
        else:
            canvas.dot(left + (x + 0.5) * size, top + (y + 0.5) * size, 3.5, ORANGE)
    size = policy.query_tile * cell
    y, x = divmod(tile, queries.shape[1])
    canvas.box(left + x * size, top + y * size, size, size, stroke=INK, line=2.5)
    canvas.box(12, 276, 12, 12, stroke=INK, line=2.5)
    canvas.text(30, 287, "query tile")
    canvas.dot(122, 282, 2.5, BLUE)
    canvas.text(130, 287, "key that is read")
    canvas.dot(252, 282, 3.5, ORANGE)
    canvas.text(260, 287, "tile's mean key (tail)")
    canvas.text(
        12,
        311,
        f"{len(read) * policy.key_tile**2} keys and {len(keys.table) - len(read)} means instead of {q.shape[2]:,} keys",
        fill=GREY,
    )
    return canvas


FIGURES = {
    "blocks/conditional": conditional, "blocks/dual_cross": dual_cross, "blocks/efficient_probing": efficient_probing,
    "blocks/halo": halo, "blocks/match_attention": match_attention, "blocks/minimal": minimal, "blocks/span": span,
    "blocks/subspace": subspace, "blocks/symmetric_gate": symmetric_gate, "how-to/frozen": frozen,
    "how-to/frozen_policies": frozen_policies, "mixers": mixers,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(path.rpartition('/')[2] for path in FIGURES)}")
    args = parser.parse_args()
    for path, draw in FIGURES.items():
        if args.names and path.rpartition("/")[2] not in args.names:
            continue
        torch.manual_seed(0)
        size = draw().write(DOCS / f"{path}.svg")
        print(f"{path}.svg: {size:,} bytes" + (f", more than {LARGEST:,}" if size > LARGEST else ""))


if __name__ == "__main__":
    main()
