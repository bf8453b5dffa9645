// Disparities as colours (visionattn/predict/colours.py): blue is far, red is near, black is unknown.

// Coefficients of x^0 to x^5 of red, green and blue: the colour map Turbo by A. Mikhailov in polynomials by R. Du,
// copyright 2019 Google LLC, Apache-2.0 (turbo_colormap.glsl).
const TURBO = [
  [0.13572138, 4.6153926, -42.66032258, 132.13108234, -152.94239396, 59.28637943],
  [0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604],
  [0.1066733, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973],
];
const TOP = 0.995; // the share of values below what is red, so that single wrong pixels do not take the colours

/** Upper end of the colour scale; 1 if no value is above 0. */
export function usualTop(values: Float32Array): number {
  const known = values.filter((value) => value > 0).sort();
  return known.length ? known[Math.min(Math.floor(TOP * known.length), known.length - 1)] : 1;
}

/** Red, green and blue, 0 to 255, for x from 0 to 1. */
export function turbo(x: number): [number, number, number] {
  const at = Math.min(Math.max(x, 0), 1);
  const [red, green, blue] = TURBO.map((line) => 255 * line.reduceRight((sum, factor) => sum * at + factor, 0));
  return [red, green, blue];
}

/** Colour image of disparities; values not above 0 are black. */
export function disparityColours(values: Float32Array, height: number, width: number, top: number): ImageData {
  const steps = 1024;
  const table = Array.from({ length: steps + 1 }, (_, step) => turbo(step / steps));
  const image = new ImageData(width, height);
  for (let place = 0; place < values.length; place++) {
    const value = values[place];
    const colour = value > 0 ? table[Math.round(steps * Math.min(value / top, 1))] : [0, 0, 0];
    image.data.set([...colour, 255], 4 * place);
  }
  return image;
}
