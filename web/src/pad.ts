// A drawing area for a digit; the drawing is converted to the format of the training data: 28 x 28, centred by mass.

/** Side of the drawing area in pixels. */
export const SIDE = 280;
const GRID = 28;
const BOX = 20; // the longer side of a digit, in the 28 x 28
const PEN = 22;
const INK = 24; // of 255, from which on a pixel counts

export interface Pad {
  clear(): void;
  /** Show a sample digit, light on dark. */
  show(image: CanvasImageSource): void;
}

/** @param changed Called with the digit (28 x 28, 0 to 1) after each stroke, or undefined when nothing is drawn. */
export function drawingPad(canvas: HTMLCanvasElement, changed: (digit?: Float32Array) => void): Pad {
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  let last: [number, number] | undefined;

  const clear = () => {
    context.fillStyle = "black";
    context.fillRect(0, 0, SIDE, SIDE);
  };
  const report = () => changed(centred(context.getImageData(0, 0, SIDE, SIDE)));
  const stroke = (event: PointerEvent) => {
    const box = canvas.getBoundingClientRect();
    const to: [number, number] = [
      ((event.clientX - box.left) * SIDE) / box.width,
      ((event.clientY - box.top) * SIDE) / box.height,
    ];
    context.strokeStyle = "white";
    context.lineWidth = PEN;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...(last ?? to));
    context.lineTo(...to);
    context.stroke();
    last = to;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last) stroke(event);
  });
  for (const name of ["pointerup", "pointercancel"] as const) {
    canvas.addEventListener(name, () => {
      if (!last) return;
      last = undefined;
      report();
    });
  }
  clear();
  return {
    clear() {
      clear();
      changed();
    },
    show(image) {
      clear();
      context.drawImage(image, 0, 0, SIDE, SIDE);
      report();
    },
  };
}

/** Scale a drawing into the box and centre it by its mass; undefined if it is empty. */
function centred(drawing: ImageData): Float32Array | undefined {
  let [left, top, right, bottom] = [SIDE, SIDE, -1, -1];
  for (let place = 0; place < SIDE * SIDE; place++) {
    if (drawing.data[4 * place] < INK) continue;
    const [x, y] = [place % SIDE, Math.floor(place / SIDE)];
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  }
  if (right < 0) return undefined;
  const [width, height] = [right - left + 1, bottom - top + 1];
  const scale = BOX / Math.max(width, height);
  const source = new OffscreenCanvas(SIDE, SIDE);
  source.getContext("2d")!.putImageData(drawing, 0, 0);
  const place = (x: number, y: number) => {
    const small = new OffscreenCanvas(GRID, GRID).getContext("2d", { willReadFrequently: true })!;
    small.imageSmoothingQuality = "high";
    small.drawImage(source, left, top, width, height, x, y, scale * width, scale * height);
    const { data } = small.getImageData(0, 0, GRID, GRID);
    return Float32Array.from({ length: GRID * GRID }, (_, pixel) => data[4 * pixel] / 255);
  };
  const [x, y] = [(GRID - scale * width) / 2, (GRID - scale * height) / 2];
  const first = place(x, y);
  const mass = first.reduce((sum, value) => sum + value) || 1;
  const centre = (coordinate: (pixel: number) => number) =>
    first.reduce((sum, value, pixel) => sum + value * (coordinate(pixel) + 0.5), 0) / mass;
  return place(
    x + Math.round(GRID / 2 - centre((pixel) => pixel % GRID)),
    y + Math.round(GRID / 2 - centre((pixel) => Math.floor(pixel / GRID))),
  );
}
