// What the page and its worker say to each other.

export interface Floats {
  data: Float32Array;
  dims: number[];
}

/** Where the numbers are computed. */
export type Provider = "wasm" | "webgpu";

export interface Request {
  id: number;
  /** Address of the model, and its size for the progress of its download. */
  url: string;
  bytes: number;
  inputs: Record<string, Floats>;
  provider: Provider;
  threads: number;
  /** Address that the runtime's files lie below. */
  runtime: string;
}

export interface Loading {
  kind: "loading";
  id: number;
  /** Of the model, 0 to 1. */
  done: number;
}

export interface Result {
  kind: "result";
  id: number;
  outputs: Record<string, Floats>;
  /** Of the computation alone, without loading. */
  milliseconds: number;
  /** What computed, which is WebAssembly where WebGPU did not start. */
  provider: Provider;
  threads: number;
}

export interface Failure {
  kind: "failure";
  id: number;
  message: string;
}

export type Answer = Loading | Result | Failure;
