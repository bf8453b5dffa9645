// Messages between the page and its worker.

export interface Floats {
  data: Float32Array;
  dims: number[];
}

/** Backend of the computation. */
export type Provider = "wasm" | "webgpu";

export interface Request {
  id: number;
  /** Addresses of the model and of the file of its weights, and their size for the progress of the download. */
  url: string;
  weights?: string;
  bytes: number;
  inputs: Record<string, Floats>;
  provider: Provider;
  threads: number;
  /** Base address of the runtime's files. */
  runtime: string;
}

export interface Loading {
  kind: "loading";
  id: number;
  /** Fraction of the model that is downloaded, 0 to 1. */
  done: number;
}

export interface Result {
  kind: "result";
  id: number;
  outputs: Record<string, Floats>;
  /** Time of the computation, without loading. */
  milliseconds: number;
  /** Backend that was used: WebAssembly if WebGPU did not start. */
  provider: Provider;
  threads: number;
}

export interface Failure {
  kind: "failure";
  id: number;
  message: string;
}

export type Answer = Loading | Result | Failure;
