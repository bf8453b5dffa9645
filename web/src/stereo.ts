// Depth and visibility from the disparities of a rectified pair (visionattn/predict/stereo.py).

export interface Camera {
  /** Focal length in pixels. */
  focal: number;
  /** Baseline in metres. */
  baseline: number;
  /** Column of the right view's principal point minus the left's, in pixels. */
  doffs: number;
}

/** Distance of a point in metres. */
export function metres(disparity: number, { focal, baseline, doffs }: Camera): number {
  return (focal * baseline) / (disparity + doffs);
}

/**
 * Find the non-occluded pixels of the left view, where both disparities agree up to `tolerance`.
 *
 * @param both Disparities of the left view (H, W), then of the right one, in pixels of this resolution or a higher one.
 */
export function seenInBoth(both: Float32Array, height: number, width: number, tolerance = 2): Uint8Array {
  const seen = new Uint8Array(height * width);
  for (let y = 0, place = 0; y < height; y++) {
    for (let x = 0; x < width; x++, place++) {
      const value = both[place];
      const other = Math.round(x - value);
      if (!(value > 0) || other < 0) continue;
      seen[place] = Number(Math.abs(both[height * width + y * width + other] - value) <= tolerance);
    }
  }
  return seen;
}
