// Upscaling of a photograph, tile by tile, compared with the browser's own scaling.

import { compare } from "./compare";
import { choose, fetchExample, find, onFile } from "./dom";
import { describeTiming, type Engine } from "./engine";
import { Job, type Report } from "./job";
import { type Model, megabytes } from "./models";
import { checkSize, readImage, save, toFloats, toPixels } from "./pixels";
import { planTiles } from "./tiles";

const SIDE = 256; // pixels of a tile: an activation of the network stays in a few megabytes

export function enlargePanel(root: HTMLElement, engine: Engine, models: Model[]): void {
  const job = new Job(find(root, ".job"));
  const view = compare(find(root, ".result"));
  let photograph: { image: ImageData; name: string } | undefined;
  let scale = "4";
  let precision: string = "fp32";

  const model = () => {
    const fitting = models.filter((one) => String(one.scale) === scale);
    return fitting.find((one) => one.precision === precision) ?? fitting[0];
  };

  const start = (load: () => Promise<{ image: ImageData; name: string }>) =>
    job.run(async (signal, report) => {
      photograph = await load();
      return enlarge(photograph.image, photograph.name, signal, report);
    });

  async function enlarge(image: ImageData, name: string, signal: AbortSignal, report: Report): Promise<string> {
    const { width, height } = image;
    const used = model();
    const times = used.scale ?? 1;
    checkSize(times * width, times * height, "The result", "choose a smaller factor or photograph");
    view.begin(image, times);
    const tiles = planTiles(height, width, Math.max(SIDE, 4 * (used.radius ?? 0)), used.radius ?? 0);
    let milliseconds = 0;
    let result;
    for (const [place, tile] of tiles.entries()) {
      const left = place ? `, about ${Math.ceil(((milliseconds / place) * (tiles.length - place)) / 1000)} s left` : "";
      report(tiles.length > 1 ? `Tile ${place + 1} of ${tiles.length}${left}` : "Enlarging", place / tiles.length);
      result = await engine.run(used, { [used.input_names[0]]: toFloats(image, tile.rows, tile.columns) }, signal, (done) =>
        report(`Loading the model, ${megabytes(used.bytes)}`, done),
      );
      milliseconds += result.milliseconds;
      const output = result.outputs[used.output_names[0]];
      const inside = (kept: { start: number; stop: number }, read: { start: number }) => ({
        start: times * (kept.start - read.start),
        stop: times * (kept.stop - read.start),
      });
      const rows = inside(tile.keptRows, tile.rows);
      const columns = inside(tile.keptColumns, tile.columns);
      view.add(toPixels(output, rows, columns), times * tile.keptColumns.start, times * tile.keptRows.start);
      root.dispatchEvent(new CustomEvent("tile", { detail: { tile, output, rows, columns } }));
    }
    view.end(`${name.replace(/\.[^.]*$/, "")}-x${times}.png`);
    const pieces = tiles.length > 1 ? `, in ${tiles.length} tiles` : "";
    const sizes = `${width} × ${height} to ${times * width} × ${times * height} pixels`;
    return `${sizes} in ${describeTiming(milliseconds, result!)}${pieces}.`;
  }

  const again = () => {
    const last = photograph;
    if (last) start(async () => last);
  };

  const scales = [...new Set(models.map((one) => String(one.scale)))].sort();
  choose(root, "scale", scales.map((value) => ({ value, label: `×${value}` })), scale, (value) => {
    scale = value;
    again();
  });
  const names: Record<string, string> = { fp32: "float32", int8: "int8" };
  const kinds = [...new Set(models.map((one) => one.precision))].map((value) => ({ value, label: names[value] }));
  choose(root, "precision", kinds, "fp32", (value) => {
    precision = value;
    again();
  });
  onFile(find(root, ".drop"), (file) => {
    start(async () => ({ image: await readImage(file, file.name), name: file.name }));
  });
  find(root, ".example").addEventListener("click", () => {
    start(async () => ({ image: await readImage(await fetchExample("cat.png"), "The example"), name: "cat.png" }));
  });
  find(root, ".save").addEventListener("click", () => {
    job.run(async () => `Saved as ${await view.save(save)}.`);
  });
}
