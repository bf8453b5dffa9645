// Two overlaid images of equal size with a movable boundary: before on the left, after on the right.

import { find } from "./dom";

type Save = (canvas: HTMLCanvasElement, name: string) => Promise<void>;

export interface Comparison {
  /** Show the image before upscaling by `scale`; the result is still empty. */
  begin(before: ImageData, scale: number): void;
  add(part: ImageData, x: number, y: number): void;
  end(name: string): void;
  save(save: Save): Promise<string>;
}

export function compare(root: HTMLElement): Comparison {
  const scroller = find<HTMLElement>(root, ".scroller");
  const layers = find<HTMLElement>(root, ".layers");
  const before = find<HTMLCanvasElement>(root, ".before");
  const after = find<HTMLCanvasElement>(root, ".after");
  const boundary = find<HTMLInputElement>(root, "input");
  const zoom = find<HTMLButtonElement>(root, ".zoom");
  const saving = find<HTMLButtonElement>(root, ".save");
  let name = "";

  /** The boundary stays in the visible area while the images scroll below it. */
  const place = () => {
    const handle = boundary.offsetHeight && 44; // its width in style.css
    const at = handle / 2 + (boundary.valueAsNumber / 100) * (boundary.offsetWidth - handle);
    const left = layers.getBoundingClientRect().left - scroller.getBoundingClientRect().left;
    after.style.clipPath = `inset(0 0 0 ${Math.max(at - left, 0)}px)`;
  };
  boundary.addEventListener("input", place);
  scroller.addEventListener("scroll", place);
  new ResizeObserver(place).observe(layers);

  const enlarge = (actual: boolean) => {
    zoom.setAttribute("aria-pressed", String(actual));
    root.classList.toggle("actual", actual);
    layers.style.width = actual ? `${after.width / devicePixelRatio}px` : "";
    place();
  };
  zoom.addEventListener("click", () => {
    const actual = zoom.getAttribute("aria-pressed") !== "true";
    enlarge(actual);
    if (!actual) return;
    scroller.scrollLeft = (scroller.scrollWidth - scroller.clientWidth) / 2;
    scroller.scrollTop = (scroller.scrollHeight - scroller.clientHeight) / 2;
  });

  return {
    begin(image, scale) {
      before.width = image.width;
      before.height = image.height;
      before.getContext("2d")?.putImageData(image, 0, 0);
      after.width = scale * image.width;
      after.height = scale * image.height;
      root.hidden = false;
      saving.disabled = true;
      layers.style.aspectRatio = `${image.width} / ${image.height}`;
      // Do not scale a small result beyond its pixels, or a tall one beyond the window.
      layers.style.maxWidth = `min(${after.width}px, ${(80 * image.width) / image.height}vh)`;
      enlarge(false);
    },
    add(part, x, y) {
      after.getContext("2d")?.putImageData(part, x, y);
    },
    end(given) {
      name = given;
      saving.disabled = false;
    },
    async save(write) {
      await write(after, name);
      return name;
    },
  };
}
