// Classification of a drawn or chosen digit, with the attention of the class token.

import { find } from "./dom";
import { describeTiming, type Engine } from "./engine";
import { Job } from "./job";
import type { Model } from "./models";
import { drawingPad, SIDE } from "./pad";
import type { Floats } from "./protocol";

const GRID = 28;

export function digitsPanel(root: HTMLElement, engine: Engine, model: Model): void {
  const job = new Job(find(root, ".job"));
  const overlay = find<HTMLCanvasElement>(root, ".attention");
  const block = find<HTMLInputElement>(root, ".block input");
  const chosen = find<HTMLOutputElement>(root, ".block output");
  const bars = probabilityBars(find(root, ".bars"), model.labels ?? []);
  let shown: { digit: Float32Array; attention: Floats } | undefined;

  const pad = drawingPad(find(root, ".pad"), (digit) => {
    if (digit) {
      job.run((signal) => read(digit, signal));
      return;
    }
    shown = undefined;
    bars([]);
    paint();
  });
  find(root, ".clear").addEventListener("click", () => pad.clear());

  async function read(digit: Float32Array, signal: AbortSignal): Promise<string> {
    const [mean, std] = [model.mean?.[0] ?? 0, model.std?.[0] ?? 1];
    const data = digit.map((value) => (value - mean) / std);
    const image = { data: data.slice(), dims: [1, 1, GRID, GRID] }; // a copy, since the worker takes it over
    const answer = await engine.run(model, { [model.input_names[0]]: image }, signal);
    const [logits, attention] = model.output_names.map((name) => answer.outputs[name]);
    shown = { digit, attention };
    root.dispatchEvent(new CustomEvent("digit", { detail: { input: { data, dims: [1, 1, GRID, GRID] }, logits, attention } }));
    const chances = softmax(logits.data);
    bars(chances);
    const best = chances.indexOf(Math.max(...chances));
    overlay.setAttribute("aria-label", `The digit with the attention of the model, which reads ${best}`);
    paint();
    return `It reads ${best}, at ${percent(chances[best])}, in ${describeTiming(answer.milliseconds, answer)}.`;
  }

  function paint(): void {
    const context = overlay.getContext("2d")!;
    context.clearRect(0, 0, SIDE, SIDE);
    chosen.value = block.value;
    if (!shown) return;
    const { attention, digit } = shown;
    const [, blocks, rows, columns] = attention.dims;
    block.max = String(blocks);
    const from = (block.valueAsNumber - 1) * rows * columns;
    context.putImageData(attentionPicture(digit, attention.data.subarray(from, from + rows * columns), rows, columns), 0, 0);
  }

  block.max = block.value = String(model.blocks ?? 1);
  block.addEventListener("input", paint);
  paint();
  showSamples(find(root, ".samples"), (image) => pad.show(image));
}

function softmax(logits: Float32Array): number[] {
  const top = Math.max(...logits);
  const powers = [...logits].map((value) => Math.exp(value - top));
  const sum = powers.reduce((total, value) => total + value);
  return powers.map((value) => value / sum);
}

function percent(share: number): string {
  return `${(100 * share).toFixed(share > 0.999 ? 0 : 1)} %`;
}

/** Create ten bars; the returned function sets their values. */
function probabilityBars(list: HTMLElement, labels: string[]): (chances: number[]) => void {
  const rows = labels.map((label) => {
    const row = document.createElement("li");
    const [name, bar, value] = ["span", "meter", "span"].map((tag) => document.createElement(tag));
    name.textContent = label;
    bar.setAttribute("aria-label", `Probability of ${label}`);
    row.append(name, bar, value);
    list.append(row);
    return { row, bar: bar as HTMLMeterElement, value };
  });
  return (chances) => {
    const top = Math.max(...chances);
    rows.forEach(({ row, bar, value }, place) => {
      const chance = chances[place] ?? 0;
      bar.value = chance;
      value.textContent = chances.length ? percent(chance) : "";
      row.classList.toggle("best", chance === top);
    });
  };
}

/** Draw the digit dimmed, with the attention interpolated between the centres of its patches. */
function attentionPicture(digit: Float32Array, map: Float32Array, rows: number, columns: number): ImageData {
  const picture = new ImageData(SIDE, SIDE);
  const top = Math.max(...map) || 1;
  const at = (row: number, column: number) =>
    map[Math.min(Math.max(row, 0), rows - 1) * columns + Math.min(Math.max(column, 0), columns - 1)] / top;
  for (let y = 0, place = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++, place += 4) {
      const ink = digit[Math.floor((y * GRID) / SIDE) * GRID + Math.floor((x * GRID) / SIDE)];
      const [v, u] = [((y + 0.5) * rows) / SIDE - 0.5, ((x + 0.5) * columns) / SIDE - 0.5];
      const [r, c] = [Math.floor(v), Math.floor(u)];
      const upper = at(r, c) * (1 - u + c) + at(r, c + 1) * (u - c);
      const lower = at(r + 1, c) * (1 - u + c) + at(r + 1, c + 1) * (u - c);
      const glow = upper * (1 - v + r) + lower * (v - r);
      picture.data[place] = 255 * (0.45 * ink + 0.9 * glow);
      picture.data[place + 1] = 255 * (0.45 * ink + 0.5 * glow * glow);
      picture.data[place + 2] = 255 * (0.5 * ink + 0.12 * glow);
      picture.data[place + 3] = 255;
    }
  }
  return picture;
}

/** Create one button per digit of a strip of squares. */
async function showSamples(group: HTMLElement, take: (image: CanvasImageSource) => void): Promise<void> {
  const strip = await createImageBitmap(await (await fetch("examples/digits.png")).blob());
  const side = strip.height;
  for (let digit = 0; digit * side < strip.width; digit++) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    canvas.getContext("2d")?.drawImage(strip, digit * side, 0, side, side, 0, 0, side, side);
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Use the sample digit ${digit}`);
    button.append(canvas);
    button.addEventListener("click", () => take(canvas));
    group.append(button);
  }
}
