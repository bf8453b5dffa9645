// Tiles that overlap by the receptive field, so that there are no seams (visionattn/predict/tiles.py).

export interface Span {
  start: number;
  stop: number;
}

/** The interval of the input that is read, and the interval within it that is kept. */
export interface Tile {
  rows: Span;
  columns: Span;
  keptRows: Span;
  keptColumns: Span;
}

/** Divide one side into windows of at most `window` pixels; `overlap` pixels at each inner border are discarded. */
function cut(length: number, window: number, overlap: number): { read: Span; kept: Span }[] {
  if (window >= length) return [{ read: { start: 0, stop: length }, kept: { start: 0, stop: length } }];
  const most = window - 2 * overlap;
  if (most < 1) throw new RangeError("A tile must be larger than its overlap.");
  const step = Math.ceil(length / Math.ceil(length / most));
  const parts = [];
  for (let start = 0; start < length; start += step) {
    const stop = Math.min(start + step, length);
    const read = { start: Math.max(start - overlap, 0), stop: Math.min(stop + overlap, length) };
    parts.push({ read, kept: { start, stop } });
  }
  return parts;
}

/** Divide an image into tiles of at most `side` x `side` pixels. */
export function planTiles(height: number, width: number, side: number, overlap: number): Tile[] {
  const lines = cut(width, side, overlap);
  return cut(height, side, overlap).flatMap((row) =>
    lines.map((column) => ({ rows: row.read, columns: column.read, keptRows: row.kept, keptColumns: column.kept })),
  );
}
