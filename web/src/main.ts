import { depthPanel } from "./depth";
import { digitsPanel } from "./digits";
import { find } from "./dom";
import { Engine, hasGraphics, MOST_THREADS } from "./engine";
import { enlargePanel } from "./enlarge";
import { loadModels } from "./models";
import type { Provider } from "./protocol";
import { tabs } from "./tabs";

const CREDITS =
  "Computed by ONNX Runtime Web. Examples: the cat Chelsea by S. van der Walt (CC0); the pair Motorcycle by " +
  "D. Scharstein et al. (GCPR 2014).";

async function start(): Promise<void> {
  tabs(document);
  find(document, ".credits").textContent = CREDITS;
  const engine = new Engine();
  settings(engine);
  const models = await loadModels();
  const of = (task: string) => models.filter((model) => model.task === task);
  enlargePanel(find(document, "#enlarge"), engine, of("restore"));
  depthPanel(find(document, "#depth"), engine, of("stereo")[0]);
  digitsPanel(find(document, "#digits"), engine, of("classify")[0]);
  document.body.dataset.ready = "true";
}

function settings(engine: Engine): void {
  const provider = find<HTMLSelectElement>(document, "#provider");
  const threads = find<HTMLSelectElement>(document, "#threads");
  for (let count = 1; count <= MOST_THREADS; count++) threads.add(new Option(String(count)));
  threads.value = String(engine.threads);
  threads.disabled = MOST_THREADS === 1;
  threads.addEventListener("change", () => {
    engine.threads = Number(threads.value);
  });
  provider.addEventListener("change", () => {
    engine.provider = provider.value as Provider;
  });
  hasGraphics().then((found) => {
    if (found) provider.add(new Option("the graphics card (WebGPU)", "webgpu"));
  });
}

async function keepForOffline(): Promise<void> {
  const told = find(document, "#offline");
  if (!("serviceWorker" in navigator)) {
    told.textContent = "This browser cannot store the page for offline use.";
    return;
  }
  try {
    await navigator.serviceWorker.register("offline.js");
    await navigator.serviceWorker.ready;
    told.textContent = "Stored in this browser: the page works offline.";
  } catch {
    told.textContent = "The page could not be stored for offline use.";
  }
}

start().catch((error) => {
  const shown = Object.assign(document.createElement("p"), { className: "error", textContent: String(error.message) });
  shown.setAttribute("role", "alert");
  find(document, "main").prepend(shown);
});
keepForOffline();
