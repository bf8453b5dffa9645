// Drives the page in Chromium as a person would. Requests come as lines of JSON on standard input, {"do": NAME, ...},
// and each is answered by a line: {"value": ...} or {"error": ...}. Numbers of models come from the page's own events.
//
//   node drive.mjs CHROMIUM MODULES [BROWSER ARGUMENTS...]      MODULES: the folder that holds playwright-core

import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";

const [, , executablePath, modules, ...args] = process.argv;
const { chromium } = createRequire(join(modules, "x.js"))("playwright-core");
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", ...args] });
let page;
let problems = [];
let requests = [];

const encoded = `(floats) => {
  const bytes = new Uint8Array(floats.data.buffer, floats.data.byteOffset, floats.data.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return { dims: floats.dims, data: btoa(text) };
}`;

const actions = {
  async open({ url, ...options }) {
    await actions.visit({ url, ...options });
    await actions.ready();
  },
  /** Open any page, in a context of its own. */
  async visit({ url, width = 1280, height = 900, dark = false }) {
    await page?.context().close();
    const context = await browser.newContext({
      viewport: { width, height },
      colorScheme: dark ? "dark" : "light",
      acceptDownloads: true,
    });
    page = await context.newPage();
    problems = [];
    requests = [];
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) problems.push(message.text());
    });
    page.on("pageerror", (error) => problems.push(String(error)));
    page.on("request", (request) => {
      requests.push(request.url());
      if (!/^(http:\/\/127\.0\.0\.1|blob:|data:)/.test(request.url())) problems.push(`loads ${request.url()}`);
    });
    await page.goto(url);
  },
  async load({ url }) {
    await page.goto(url);
    await actions.ready();
  },
  /** Wait until the page of the demo is ready, and collect its events. */
  async ready() {
    await page.waitForSelector("body[data-ready]");
    // Events of the page that carry a model's numbers.
    await page.evaluate(`(() => {
      const encode = ${encoded};
      window.seen = [];
      for (const [panel, name] of [["enlarge", "tile"], ["depth", "disparity"], ["digits", "digit"]])
        document.getElementById(panel).addEventListener(name, ({ detail }) => {
          const found = { name };
          for (const [key, value] of Object.entries(detail.data ? { output: detail } : detail))
            found[key] = value.data ? encode(value) : ArrayBuffer.isView(value) ? Array.from(value) : value;
          window.seen.push(found);
        });
    })()`);
  },
  version: async () => browser.version(),
  problems: async () => problems,
  requests: async () => requests.filter((url) => url.startsWith("http")),
  evaluate: ({ code }) => page.evaluate(code),
  async events() {
    return page.evaluate("window.seen.splice(0)");
  },
  click: ({ selector }) => page.click(selector),
  press: ({ selector, key }) => page.press(selector, key),
  fill: ({ selector, value }) => page.fill(selector, value),
  select: ({ selector, value }) => page.selectOption(selector, value),
  files: ({ selector, path }) => page.setInputFiles(selector, path),
  text: ({ selector }) => page.textContent(selector),
  visible: ({ selector }) => page.isVisible(selector),
  /** Wait until an element's text is not empty, or fits a pattern; give the text. */
  async told({ selector, pattern = ".", timeout = 60000 }) {
    await page.waitForFunction(
      ([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector)?.textContent ?? ""),
      [selector, pattern],
      { timeout },
    );
    return page.textContent(selector);
  },
  async draw({ selector, points }) {
    const box = await page.locator(selector).boundingBox();
    const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
    await page.mouse.move(...at(points[0]));
    await page.mouse.down();
    for (const point of points.slice(1)) await page.mouse.move(...at(point), { steps: 4 });
    await page.mouse.up();
  },
  screenshot: ({ path, whole = true }) => page.screenshot({ path, fullPage: whole }).then(() => path),
  async download({ selector, path }) {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click(selector)]);
    await download.saveAs(path);
    return download.suggestedFilename();
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  let answer;
  try {
    answer = { value: (await actions[request.do](request)) ?? null };
  } catch (error) {
    answer = { error: String(error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();
