r"""Smoothing along the edges of an image: the fast global smoother, with confidences.

A smoother S finds the u that minimises, over pixels p and pairs of neighbours p, q,

    sum (u_p - f_p)^2 + l sum w_pq (u_p - u_q)^2        w_pq = exp(-|I_p - I_q| / s)

for values f. Where an image I changes, w is small, and neighbours may differ. Values of different confidence c are
smoothed as S(c f) / S(c), a weighted mean: where c is small, it is that of confident pixels which no edge separates.

In one dimension u solves (1 + l L) u = f, L being the Laplacian of w, which is tridiagonal. In two, S is approximated
by turns: all rows, then all columns, T times, with strengths that fall by a factor of 4:

    l_t = 1.5 l 4^(T - t) / (4^T - 1)

Source: D. Min et al., Fast Global Image Smoothing Based on Weighted Least Squares, IEEE Transactions on Image
Processing, 2014.
"""

from __future__ import annotations

import numpy as np

__all__ = ["smooth"]

TURNS = 3
LEAST = 1e-200  # what is left of confidences after many edges loses its digits below this


def smooth(
    values: np.ndarray, confidence: np.ndarray, image: np.ndarray, strength: float, contrast: float
) -> np.ndarray:
    """Smooth values along the edges of an image (equations: see the module).

    Args:
        values: f, (H, W); NaN where there is none.
        confidence: c, (H, W), at least 0.
        image: I, (H, W, C).
        strength: l.
        contrast: s, a distance of colours, in units of the image.

    Returns:
        S(c f) / S(c), float64 (H, W); NaN where no value reaches.
    """
    known = np.isfinite(values)
    confidence = np.where(known, confidence, 0.0)
    sums = np.stack([confidence * np.where(known, values, 0), confidence])
    image = image.astype(np.float64)
    across, down = (np.exp(-np.linalg.norm(np.diff(image, axis=axis), axis=2) / contrast) for axis in (1, 0))
    for turn in range(1, TURNS + 1):
        part = 1.5 * strength * 4 ** (TURNS - turn) / (4**TURNS - 1)
        sums = _diffuse(sums, part * across)
        sums = _diffuse(sums.transpose(0, 2, 1), part * down.T).transpose(0, 2, 1)
    weighted, total = sums
    return np.divide(weighted, total, out=np.full_like(total, np.nan), where=total > LEAST)


def _diffuse(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Solve (1 + L) x = values along rows, L being the Laplacian of the weights of neighbours.

    Args:
        values: (K, H, W).
        weights: (H, W - 1).
    """
    # Columns come first, so that each step of the recursion works on contiguous memory.
    x = np.ascontiguousarray(values.transpose(2, 0, 1))
    before, after = np.pad(weights.T, ((1, 0), (0, 0))), np.pad(weights.T, ((0, 1), (0, 0)))
    diagonal = 1 + before + after
    ratio = np.empty_like(diagonal)
    ratio[0], x[0] = after[0] / diagonal[0], x[0] / diagonal[0]
    for i in range(1, len(x)):
        pivot = diagonal[i] - before[i] * ratio[i - 1]
        ratio[i] = after[i] / pivot
        x[i] = (x[i] + before[i] * x[i - 1]) / pivot
    for i in range(len(x) - 2, -1, -1):
        x[i] += ratio[i] * x[i + 1]
    return x.transpose(1, 2, 0)
