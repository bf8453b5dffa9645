// The page is static files: scripts and styles with a hash in their names, ONNX Runtime's WebAssembly, models, examples.

import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { defaultClientConditions, defineConfig } from "vite";

const here = dirname(fileURLToPath(import.meta.url));
const runtime = join(here, "node_modules/onnxruntime-web/dist");
// asyncify: the build with WebGPU.
const RUNTIME = ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"].flatMap((name) => [`${name}.mjs`, `${name}.wasm`]);

// ONNX Runtime's files under their own names, since its threads load them by name.
function copyRuntime() {
  return {
    name: "copy-runtime",
    generateBundle() {
      for (const name of RUNTIME) {
        this.emitFile({ type: "asset", fileName: `runtime/${name}`, source: readFileSync(join(runtime, name)) });
      }
    },
  };
}

function filesBelow(folder) {
  return readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name));
}

// Tells the service worker what to keep, and under which version.
function listForOffline() {
  return {
    name: "list-for-offline",
    enforce: "post",
    generateBundle(_, bundle) {
      const hash = createHash("sha256");
      const built = Object.values(bundle).filter((part) => part.fileName !== "offline.js");
      for (const part of built) hash.update(part.fileName).update(part.type === "chunk" ? part.code : part.source);
      const folder = join(here, "public");
      const others = filesBelow(folder);
      for (const path of others) hash.update(path).update(readFileSync(path));
      const files = ["./", ...built.map((part) => part.fileName), ...others.map((path) => relative(folder, path))]
        // The build with WebGPU is kept once it has been used: most browsers never load it.
        .filter((name) => name !== "index.html" && !name.includes("asyncify") && !name.includes("webgpu"))
        .sort();
      const chunk = bundle["offline.js"];
      chunk.code = chunk.code
        .replace("__FILES__", JSON.stringify(files))
        .replace("__VERSION__", JSON.stringify(hash.digest("hex").slice(0, 16)));
    },
  };
}

export default defineConfig({
  root: here,
  base: "./",
  // The variants of ONNX Runtime that load their WebAssembly from a file of ours.
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions] },
  worker: { format: "es", rollupOptions: { output: { chunkFileNames: "assets/[name]-[hash].js" } } },
  plugins: [copyRuntime(), listForOffline()],
  build: {
    outDir: join(here, "../visionattn/demo/page"),
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    rollupOptions: {
      input: { index: join(here, "index.html"), offline: join(here, "src/offline.ts") },
      output: { entryFileNames: (chunk) => (chunk.name === "offline" ? "offline.js" : "assets/[name]-[hash].js") },
    },
  },
});
