// Conversion between files, canvases and the tensors of a model: planes of red, green and blue, 0 to 1.

import type { Floats } from "./protocol";
import type { Span } from "./tiles";

/** Limits of a browser's canvas, which also apply to files. */
const LONGEST = 16384;
const MOST_PIXELS = 2 ** 28;

/** Read an image file, rotated upright and blended onto white. */
export async function readImage(file: Blob, name: string): Promise<ImageData> {
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    const empty = file.size === 0 ? "the file is empty" : "it is damaged, or not an image that this browser supports";
    throw new Error(`${name} cannot be opened: ${empty}. Use PNG, JPEG, WebP, AVIF or GIF.`);
  }
  try {
    checkSize(bitmap.width, bitmap.height, name, "reduce it first");
    return drawn(bitmap, bitmap.width, bitmap.height);
  } finally {
    bitmap.close();
  }
}

/** Throw an error for an image that exceeds the limits of a canvas. */
export function checkSize(width: number, height: number, name: string, remedy: string): void {
  if (Math.max(width, height) <= LONGEST && width * height <= MOST_PIXELS) return;
  const size = `${width.toLocaleString("en")} × ${height.toLocaleString("en")}`;
  const most = `${LONGEST.toLocaleString("en")} per side and ${Math.floor(MOST_PIXELS / 1e6)} million in total`;
  throw new Error(`${name} has ${size} pixels; the maximum is ${most}: ${remedy}.`);
}

function drawn(source: CanvasImageSource, width: number, height: number): ImageData {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("There is not enough memory for this image.");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Scale an image. */
export function resized(image: ImageData, width: number, height: number): ImageData {
  if (image.width === width && image.height === height) return image;
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d")?.putImageData(image, 0, 0);
  return drawn(canvas, width, height);
}

/** A window of an image as a tensor (1, 3, rows, columns). */
export function toFloats(image: ImageData, rows?: Span, columns?: Span): Floats {
  const { start: top, stop: bottom } = rows ?? { start: 0, stop: image.height };
  const { start: left, stop: right } = columns ?? { start: 0, stop: image.width };
  const height = bottom - top;
  const width = right - left;
  const plane = height * width;
  const data = new Float32Array(3 * plane);
  let place = 0;
  for (let y = top; y < bottom; y++) {
    for (let x = left, from = 4 * (y * image.width + left); x < right; x++, from += 4, place++) {
      data[place] = image.data[from] / 255;
      data[place + plane] = image.data[from + 1] / 255;
      data[place + 2 * plane] = image.data[from + 2] / 255;
    }
  }
  return { data, dims: [1, 3, height, width] };
}

/** Convert a window of a tensor (1, 3, H, W) to pixels. */
export function toPixels({ data, dims }: Floats, rows: Span, columns: Span): ImageData {
  const [, , height, width] = dims;
  const plane = height * width;
  const image = new ImageData(columns.stop - columns.start, rows.stop - rows.start);
  let to = 0;
  for (let y = rows.start; y < rows.stop; y++) {
    for (let from = y * width + columns.start, end = y * width + columns.stop; from < end; from++, to += 4) {
      // Rounds to the nearest, and clamps to 0..255.
      image.data[to] = 255 * data[from];
      image.data[to + 1] = 255 * data[from + plane];
      image.data[to + 2] = 255 * data[from + 2 * plane];
      image.data[to + 3] = 255;
    }
  }
  return image;
}

/** Draw an image on a canvas and set the canvas to its size. */
export function show(canvas: HTMLCanvasElement, image: ImageData): void {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d")?.putImageData(image, 0, 0);
}

/** Let the browser save a canvas as a PNG file. */
export async function save(canvas: HTMLCanvasElement, name: string): Promise<void> {
  const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("There is not enough memory to save this image.");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
