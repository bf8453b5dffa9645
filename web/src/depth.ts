// Disparity of two rectified views: as a colour image, and as a 3D view of the scene.

import { Cloud } from "./cloud";
import { disparityColours, usualTop } from "./colours";
import { choose, fetchExample, find, onFile } from "./dom";
import { describeTiming, type Engine } from "./engine";
import { Job, type Report } from "./job";
import { type Model, megabytes } from "./models";
import { readImage, resized, save, show, toFloats } from "./pixels";
import { type Camera, metres, seenInBoth } from "./stereo";
import { buildSurface } from "./surface";

type Side = "left" | "right";

// Maximum number of pixels that are matched: the network compares whole rows, so that tiling is not possible.
const DETAIL = { quick: 110_000, fine: 400_000 };
// Camera of scikit-image's pair "Motorcycle", in pixels and metres.
const EXAMPLE = { focal: 994.978, baseline: 0.193001, doffs: 31.086 };
const MUCH = 0.3; // of the pixels without a match, and the views may be exchanged

interface Found {
  /** In pixels of the photographs; values not above 0 are unknown. */
  disparity: Float32Array;
  height: number;
  width: number;
  /** Pixels of the photograph per pixel of the disparity map. */
  ratio: number;
  /** Disparities of both views, the left one first. */
  both: Float32Array;
  /** The left view at this size. */
  view: ImageData;
}

export function depthPanel(root: HTMLElement, engine: Engine, used: Model): void {
  const job = new Job(find(root, ".job"));
  const result = find<HTMLElement>(root, ".result");
  const colours = find<HTMLCanvasElement>(root, ".colours");
  const readout = find<HTMLElement>(root, ".readout");
  const cloud = new Cloud(find(root, ".cloud"));
  const views: Partial<Record<Side, ImageData>> = {};
  const fields = Object.fromEntries(
    [...root.querySelectorAll<HTMLInputElement>(".camera input")].map((field) => [field.name, field]),
  );
  let detail: keyof typeof DETAIL = "fine";
  let found: Found | undefined;
  let summary = "";

  const camera = (): Camera | undefined => {
    const [focal, baseline, doffs] = ["focal", "baseline", "doffs"].map((name) => fields[name].valueAsNumber);
    return focal > 0 && baseline > 0 ? { focal, baseline, doffs: doffs || 0 } : undefined;
  };

  const take = (side: Side, image: ImageData) => {
    views[side] = image;
    const drop = find(root, `.drop.${side}`);
    const height = 90;
    show(find(drop, "canvas"), resized(image, Math.max(1, Math.round((height * image.width) / image.height)), height));
    drop.classList.add("filled");
  };

  const start = (load: () => Promise<void>) =>
    job.run(async (signal, report) => {
      await load();
      const { left, right } = views;
      if (!left || !right) return `Now choose the ${left ? "right" : "left"} view.`;
      return match(left, right, signal, report);
    });

  async function match(left: ImageData, right: ImageData, signal: AbortSignal, report: Report): Promise<string> {
    const { width, height } = left;
    if (right.width !== width || right.height !== height) {
      throw new Error(
        `The left view has ${width} × ${height} pixels and the right one ${right.width} × ${right.height}. ` +
          "Both must have the same size and be rectified.",
      );
    }
    const least = (used.size_minimum ?? 1) / Math.min(width, height);
    const zoom = Math.max(Math.min(1, Math.sqrt(DETAIL[detail] / (width * height))), least);
    const [h, w] = [Math.ceil(zoom * height), Math.ceil(zoom * width)];
    if (w * h > 4 * DETAIL.fine) throw new Error(`Views of ${width} × ${height} pixels are too elongated for the model: crop both to a smaller aspect ratio.`);
    report("Matching");
    const [first, second] = [left, right].map((view) => toFloats(resized(view, w, h)));
    const inputs = { [used.input_names[0]]: first, [used.input_names[1]]: second };
    const answer = await engine.run(used, inputs, signal, (done) => {
      report(done < 1 ? `Loading the model, ${megabytes(used.bytes)}` : "Matching", done < 1 ? done : undefined);
    });
    const { data } = answer.outputs[used.output_names[0]];
    root.dispatchEvent(new CustomEvent("disparity", { detail: answer.outputs[used.output_names[0]] }));
    const both = data.map((value) => (value * width) / w);
    found = { disparity: both.subarray(0, w * h), height: h, width: w, ratio: width / w, both, view: resized(left, w, h) };
    showResult(found);
    const unknown = found.disparity.filter((value) => !(value > 0)).length / (w * h);
    const exchanged = unknown > MUCH ? " Few pixels match: are the views swapped, or not rectified?" : "";
    const size = w === width ? "" : `, at ${w} × ${h} of ${width} × ${height} pixels`;
    return `Matched in ${describeTiming(answer.milliseconds, answer)}${size}.${exchanged}`;
  }

  function showResult({ disparity, height, width, ratio, both, view }: Found): void {
    const top = usualTop(disparity);
    result.hidden = false;
    show(colours, disparityColours(disparity, height, width, top));
    summary = `Disparities up to ${top.toFixed(1)} pixels`;
    const known = camera();
    if (known) summary += `, the nearest at ${metres(top, known).toFixed(2)} m`;
    colours.setAttribute("aria-label", `Depth in colours, red is near and blue is far. ${summary}.`);
    readout.textContent = `${summary}. Point at the image for single values.`;
    // Without a camera a typical lens is assumed: the surface is correct up to its scale in depth.
    const focal = (known?.focal ?? width * ratio) / ratio;
    const own = both.map((value) => value / ratio);
    const lens = { focal, doffs: known?.doffs ?? 0 };
    cloud.show(buildSurface(disparity, seenInBoth(own, height, width), width, height, lens), view, focal);
  }

  colours.addEventListener("pointermove", (event) => {
    if (!found) return;
    const box = colours.getBoundingClientRect();
    const x = Math.min(Math.floor(((event.clientX - box.left) / box.width) * found.width), found.width - 1);
    const y = Math.min(Math.floor(((event.clientY - box.top) / box.height) * found.height), found.height - 1);
    const value = found.disparity[Math.max(y, 0) * found.width + Math.max(x, 0)];
    const known = camera();
    const far = known && value > 0 ? `, ${metres(value, known).toFixed(2)} m away` : "";
    const place = `Column ${Math.round(x * found.ratio)}, row ${Math.round(y * found.ratio)}`;
    readout.textContent = `${place}: ${value > 0 ? `${value.toFixed(1)} pixels${far}` : "no match"}.`;
  });
  colours.addEventListener("pointerleave", () => {
    if (found) readout.textContent = `${summary}. Point at the image for single values.`;
  });

  const again = () => {
    if (views.left && views.right) start(async () => {});
  };
  const details = [
    { value: "quick", label: "Quick" },
    { value: "fine", label: "Fine" },
  ] as const;
  choose(root, "detail", [...details], detail, (value) => {
    detail = value;
    again();
  });
  for (const field of Object.values(fields)) {
    field.addEventListener("change", () => {
      if (found) showResult(found);
    });
  }
  for (const side of ["left", "right"] as const) {
    onFile(find(root, `.drop.${side}`), (file) => {
      start(async () => take(side, await readImage(file, file.name)));
    });
  }
  find(root, ".example").addEventListener("click", () => {
    start(async () => {
      for (const [name, value] of Object.entries(EXAMPLE)) fields[name].value = String(value);
      for (const side of ["left", "right"] as const) {
        take(side, await readImage(await fetchExample(`${side}.jpg`), "The example"));
      }
    });
  });
  find(root, ".save").addEventListener("click", () => {
    job.run(async () => {
      await save(colours, "disparity.png");
      return "Saved as disparity.png.";
    });
  });
  find(root, ".reset").addEventListener("click", () => cloud.reset());
}
