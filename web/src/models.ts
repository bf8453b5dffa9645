// Metadata of the exported files: `models.json`, written by tools/page_models.py.

export interface Model {
  /** Address of the file, relative to the page. */
  file: string;
  /** Address of the file that its weights are read from, if it does not contain them. */
  weights?: string;
  /** Size of the file, with that of its weights. */
  bytes: number;
  model: string;
  task: "restore" | "stereo" | "classify";
  precision: "fp32" | "int8";
  input_names: string[];
  output_names: string[];
  /** Channels, height, width. */
  input_size: [number, number, number];
  scale?: number;
  /** Radius of the receptive field, in input pixels. */
  radius?: number;
  size_minimum?: number;
  mean?: number[];
  std?: number[];
  labels?: string[];
  /** Number of blocks of a transformer that returns its attention. */
  blocks?: number;
}

export async function loadModels(): Promise<Model[]> {
  const response = await fetch("models/models.json");
  if (!response.ok) throw new Error("The list of models cannot be loaded. Load the page again.");
  return response.json();
}

/** "4.3 MB". */
export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
