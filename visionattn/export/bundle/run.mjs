// Runs a file of this bundle in a browser or in Node, by onnxruntime-web or onnxruntime-node.
//
//   node run.mjs model.onnx sample/input.ppm            (stereo: sample/left.ppm sample/right.ppm)
//
// In a page, import what follows and give it pixels, such as those of a canvas without its alpha:
//
//   const spec = readSpec(await (await fetch("card.json")).json(), "model.onnx");
//   const session = await ort.InferenceSession.create("model.onnx");
//   const output = await run(ort, session, spec, [{ data, height, width }]);
//
// A model for attribute retrieval has two files, model.tower.onnx and model.head.onnx:
//
//   const tokens = await run(ort, tower, spec, [{ data, height, width }]);
//   const embeddings = await embed(ort, head, spec, tokens, ["colour"]);

/** What a file says about itself, of the card: its metadata, read. */
export function readSpec(card, file) {
  const variant = card.variants.find((entry) => entry.file === file);
  if (!variant) throw new Error(`The card has no file ${file}.`);
  const read = (text) => {
    try {
      return JSON.parse(text);
    } catch {
      return text;
    }
  };
  return Object.fromEntries(Object.entries(variant.metadata).map(([key, text]) => [key, read(text)]));
}

/** Pixels (H, W, C) of 0..255 -> the tensor that the file takes. */
export function prepare(ort, { data, height, width }, spec) {
  const channels = spec.input_size[0];
  const dynamic = spec.dynamic_axes.includes("height");
  if (data.length !== channels * height * width) throw new Error(`The image must have ${channels} channels.`);
  if (!dynamic && (height !== spec.input_size[1] || width !== spec.input_size[2])) {
    throw new Error(`The image is ${height} x ${width}; this file takes ${spec.input_size.slice(1).join(" x ")}.`);
  }
  if (spec.input_type === "uint8") {
    return new ort.Tensor("uint8", Uint8Array.from(data), [1, height, width, channels]);
  }
  const [low, high] = spec.input_range;
  const values = new Float32Array(data.length);
  const pixels = height * width;
  for (let c = 0; c < channels; c++) {
    const mean = spec.mean ? spec.mean[c] : 0;
    const std = spec.std ? spec.std[c] : 1;
    for (let i = 0; i < pixels; i++) {
      values[c * pixels + i] = ((data[i * channels + c] / 255) * (high - low) + low - mean) / std;
    }
  }
  return new ort.Tensor("float32", values, [1, channels, height, width]);
}

/** One image, or two, of the file's size -> its first output, a tensor with `data` and `dims`. */
export async function run(ort, session, spec, images) {
  const feeds = Object.fromEntries(spec.input_names.map((name, i) => [name, prepare(ort, images[i], spec)]));
  return (await session.run(feeds))[spec.output_names[0]];
}

/** Tokens of a tower -> embeddings (1, A, E) for A attributes, by default all, from the head. */
export async function embed(ort, session, spec, tokens, names = spec.attributes) {
  const unknown = names.find((name) => !spec.attributes.includes(name));
  if (unknown !== undefined) throw new Error(`There is no attribute ${unknown}: use ${spec.attributes.join(", ")}.`);
  const ids = BigInt64Array.from(names, (name) => BigInt(spec.attributes.indexOf(name)));
  const conditions = new ort.Tensor("int64", ids, [ids.length]);
  return (await session.run({ tokens, conditions })).embeddings;
}

/** Logits -> probabilities. */
export function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
}

/** The output of an upscaler -> pixels (H, W, C) of 0..255. */
export function toPixels(output, spec) {
  if (spec.output_kind === "image") return { data: output.data, height: output.dims[1], width: output.dims[2] };
  const [, channels, height, width] = output.dims;
  const data = new Uint8ClampedArray(output.data.length);
  for (let c = 0; c < channels; c++) {
    for (let i = 0; i < height * width; i++) {
      data[i * channels + c] = Math.floor(Math.min(Math.max(output.data[c * height * width + i], 0), 1) * 255 + 0.5);
    }
  }
  return { data, height, width };
}

/** The bytes of a binary PGM or PPM file -> its pixels. */
export function readPpm(bytes) {
  const header = /^P([56])\s+(\d+)\s+(\d+)\s+255\s/.exec(String.fromCharCode(...bytes.slice(0, 50)));
  if (!header) throw new Error("The image must be a binary PGM or PPM file of 8 bits.");
  return { data: bytes.subarray(header[0].length), width: Number(header[2]), height: Number(header[3]) };
}

async function main([file, ...paths]) {
  if (!file || !paths.length) throw new Error("usage: node run.mjs MODEL.onnx IMAGE.ppm [IMAGE.ppm]");
  const { readFileSync, writeFileSync } = await import("node:fs");
  const { basename, dirname, join } = await import("node:path");
  const ort = await import("onnxruntime-node")
    .catch(() => import("onnxruntime-web"))
    .catch((error) => {
      throw new Error(`npm install onnxruntime-node, or onnxruntime-web: ${error.message}`);
    });
  const card = JSON.parse(readFileSync(join(dirname(file), "card.json"), "utf8"));
  const spec = readSpec(card, basename(file));
  const images = paths.map((path) => readPpm(readFileSync(path)));
  if (images.length !== spec.input_names.length) throw new Error(`Give ${spec.input_names.length} image(s).`);
  const open = (path) => ort.InferenceSession.create(readFileSync(path));
  const part = (name) => file.replace(/\.onnx$/, `.${name}.onnx`);
  let output = await run(ort, await open(spec.pair ? part("tower") : file), spec, images);
  if (spec.pair) output = await embed(ort, await open(part("head")), spec, output);
  if (spec.task === "restore") {
    const { data, height, width } = toPixels(output, spec);
    const kind = data.length === height * width ? "P5" : "P6";
    writeFileSync("result.ppm", Buffer.concat([Buffer.from(`${kind} ${width} ${height} 255\n`), Buffer.from(data)]));
    console.log(`Wrote result.ppm, ${height} x ${width}.`);
  } else if (spec.task === "classify" && spec.num_classes > 0) {
    const found = spec.output_kind === "probabilities" ? Array.from(output.data) : softmax(output.data);
    const order = found.map((_, k) => k).sort((a, b) => found[b] - found[a]);
    for (const k of order.slice(0, 5)) console.log(`${spec.labels?.[k] ?? k} ${found[k].toFixed(4)}`);
  } else {
    const values = Array.from(output.data);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    console.log(`${spec.pair ? "embeddings" : spec.output_names[0]} ${output.dims.join(" x ")}, mean ${mean.toFixed(6)}`);
  }
}

if (typeof process !== "undefined" && import.meta.url === `file://${process.argv[1]}`) {
  main(process.argv.slice(2)).catch((error) => {
    console.error(`run: ${error.message}`);
    process.exitCode = 1;
  });
}
