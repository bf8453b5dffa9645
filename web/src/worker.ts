// Runs models in a worker, so that the page stays responsive. Only the last used session is kept.

import type { InferenceSession, Tensor } from "onnxruntime-common";
import type { Answer, Floats, Provider, Request } from "./protocol";

type Runtime = typeof import("onnxruntime-web/wasm");

interface Ready {
  key: string;
  runtime: Runtime;
  session: InferenceSession;
  provider: Provider;
}

let ready: Ready | undefined;
let withoutGraphics = false; // WebGPU has failed once

function tell(answer: Answer, transfer: Transferable[] = []): void {
  self.postMessage(answer, { transfer });
}

interface Downloaded {
  name: string;
  bytes: Uint8Array;
}

/** The model, then the file of its weights, if it has one. */
async function downloadAll(request: Request): Promise<Downloaded[]> {
  const files: Downloaded[] = [];
  let size = 0;
  for (const url of [request.url, request.weights]) {
    if (!url) continue;
    const bytes = await download(url, (loaded) =>
      tell({ kind: "loading", id: request.id, done: Math.min((size + loaded) / request.bytes, 1) }),
    );
    size += bytes.length;
    files.push({ name: url.slice(url.lastIndexOf("/") + 1), bytes });
  }
  return files;
}

async function download(url: string, loading: (size: number) => void): Promise<Uint8Array> {
  const response = await fetch(url);
  if (!response.ok || !response.body) throw new Error(`The model cannot be loaded (${response.status}).`);
  const parts: Uint8Array[] = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    loading(size);
  }
  const whole = new Uint8Array(size);
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

async function loadRuntime(provider: Provider, request: Request): Promise<Runtime> {
  const runtime: Runtime =
    provider === "webgpu" ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const name = provider === "webgpu" ? "ort-wasm-simd-threaded.asyncify" : "ort-wasm-simd-threaded";
  runtime.env.wasm.wasmPaths = { mjs: `${request.runtime}${name}.mjs`, wasm: `${request.runtime}${name}.wasm` };
  runtime.env.wasm.numThreads = request.threads;
  runtime.env.logLevel = "error";
  return runtime;
}

async function start(provider: Provider, files: Downloaded[], request: Request, key: string): Promise<Ready> {
  const runtime = await loadRuntime(provider, request);
  const [model, ...weights] = files;
  const externalData = weights.map(({ name, bytes }) => ({ path: name, data: bytes }));
  const session = await runtime.InferenceSession.create(model.bytes, { executionProviders: [provider], externalData });
  return { key, runtime, session, provider };
}

async function prepare(request: Request): Promise<Ready> {
  const wanted: Provider = withoutGraphics ? "wasm" : request.provider;
  const key = `${wanted} ${request.url}`;
  if (ready?.key === key) return ready;
  const files = await downloadAll(request);
  await ready?.session.release();
  ready = undefined;
  if (wanted === "webgpu") {
    try {
      ready = await start("webgpu", files, request, key);
      return ready;
    } catch {
      withoutGraphics = true; // no adapter, or not this model
    }
  }
  ready = await start("wasm", files, request, `wasm ${request.url}`);
  return ready;
}

async function answer(request: Request): Promise<void> {
  const { runtime, session, provider } = await prepare(request);
  const feeds: Record<string, Tensor> = {};
  for (const [name, { data, dims }] of Object.entries(request.inputs)) {
    feeds[name] = new runtime.Tensor("float32", data, dims);
  }
  const begin = performance.now();
  const found = await session.run(feeds);
  const milliseconds = performance.now() - begin;
  const outputs: Record<string, Floats> = {};
  for (const [name, tensor] of Object.entries(found)) {
    // A copy, because the runtime's memory may be shared between threads and is reused.
    outputs[name] = { data: new Float32Array((await tensor.getData()) as Float32Array), dims: [...tensor.dims] };
    tensor.dispose();
  }
  const threads = provider === "wasm" ? request.threads : 1;
  tell(
    { kind: "result", id: request.id, outputs, milliseconds, provider, threads },
    Object.values(outputs).map(({ data }) => data.buffer),
  );
}

self.onmessage = async ({ data: request }: MessageEvent<Request>) => {
  try {
    await answer(request);
  } catch (error) {
    // The runtime throws a number when it runs out of memory.
    const reason = error instanceof Error ? error.message : "there may be too little memory";
    tell({ kind: "failure", id: request.id, message: reason });
  }
};
