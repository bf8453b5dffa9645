// The page's side of the worker: one computation at a time, which can be cancelled while it runs.

import type { Model } from "./models";
import type { Answer, Floats, Provider, Request, Result } from "./protocol";

/** Number of useful threads: all cores if the page may share memory between threads, otherwise one. */
export const MOST_THREADS = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;

export class Engine {
  provider: Provider = "wasm";
  threads = MOST_THREADS;
  private worker: Worker | undefined;
  private threadsOfWorker = 0;
  private count = 0;

  /**
   * Run a model once.
   *
   * @param signal Cancels: the promise is rejected with its reason at once.
   * @param loading Called with the share of the model that is loaded, 0 to 1.
   */
  run(
    model: Model,
    inputs: Record<string, Floats>,
    signal?: AbortSignal,
    loading?: (done: number) => void,
  ): Promise<Result> {
    signal?.throwIfAborted();
    const worker = this.start();
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      const finish = (act: () => void) => {
        worker.removeEventListener("message", hear);
        worker.removeEventListener("error", fail);
        signal?.removeEventListener("abort", cancel);
        act();
      };
      const hear = ({ data: answer }: MessageEvent<Answer>) => {
        if (answer.id !== id) return;
        if (answer.kind === "loading") loading?.(answer.done);
        else if (answer.kind === "result") finish(() => resolve(answer));
        else finish(() => reject(new Error(`The model could not be run: ${answer.message}`)));
      };
      const fail = (event: ErrorEvent) => {
        event.preventDefault();
        this.stop();
        finish(() => reject(new Error("The model could not be run: the browser stopped the computation.")));
      };
      // A running pass cannot be cancelled: its worker is terminated, and the next pass starts a new one.
      const cancel = () => {
        this.stop();
        finish(() => reject(signal?.reason));
      };
      worker.addEventListener("message", hear);
      worker.addEventListener("error", fail);
      signal?.addEventListener("abort", cancel);
      const request: Request = {
        id,
        url: new URL(model.file, document.baseURI).href,
        weights: model.weights && new URL(model.weights, document.baseURI).href,
        bytes: model.bytes,
        inputs,
        provider: this.provider,
        threads: this.threads,
        runtime: new URL("runtime/", document.baseURI).href,
      };
      worker.postMessage(
        request,
        Object.values(inputs).map(({ data }) => data.buffer),
      );
    });
  }

  private start(): Worker {
    // The runtime reads its number of threads only once.
    if (this.worker && this.threadsOfWorker !== this.threads) this.stop();
    this.worker ??= new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
    this.threadsOfWorker = this.threads;
    return this.worker;
  }

  private stop(): void {
    this.worker?.terminate();
    this.worker = undefined;
  }
}

/** "0.42 s in WebAssembly on 2 threads". */
export function describeTiming(milliseconds: number, { provider, threads }: Result): string {
  const seconds = milliseconds < 100 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
  if (provider === "webgpu") return `${seconds} on the graphics card (WebGPU)`;
  return `${seconds} in WebAssembly on ${threads} ${threads === 1 ? "thread" : "threads"}`;
}

export async function hasGraphics(): Promise<boolean> {
  try {
    return Boolean(await (navigator as { gpu?: { requestAdapter(): Promise<unknown> } }).gpu?.requestAdapter());
  } catch {
    return false;
  }
}
