// Small helpers for elements of the page.

/** Return the element that a selector matches. */
export function find<Kind extends Element>(root: ParentNode, selector: string): Kind {
  const element = root.querySelector<Kind>(selector);
  if (!element) throw new Error(`The page has no ${selector}.`);
  return element;
}

/** Fill a fieldset with radio buttons; it is hidden if there is only one option. */
export function choose<Value extends string>(
  root: ParentNode,
  name: string,
  options: { value: Value; label: string }[],
  chosen: Value,
  changed: (value: Value) => void,
): void {
  const field = find<HTMLFieldSetElement>(root, `fieldset[data-name="${name}"]`);
  field.hidden = options.length < 2;
  for (const { value, label } of options) {
    const input = document.createElement("input");
    input.type = "radio";
    input.name = `${root instanceof Element ? root.id : ""}-${name}`;
    input.value = value;
    input.checked = value === chosen;
    input.addEventListener("change", () => changed(value));
    const shown = document.createElement("label");
    shown.append(input, Object.assign(document.createElement("span"), { textContent: label }));
    field.append(shown);
  }
}

/** Let a label with a file input also accept a dropped file. */
export function onFile(drop: HTMLLabelElement, take: (file: File) => void): void {
  const input = find<HTMLInputElement>(drop, "input");
  input.addEventListener("change", () => {
    const file = input.files?.[0];
    input.value = ""; // the same file may be chosen again
    if (file) take(file);
  });
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const file = event.dataTransfer?.files[0];
    if (file) take(file);
  });
}

/** Load one of the examples. */
export async function fetchExample(name: string): Promise<Blob> {
  const response = await fetch(`examples/${name}`);
  if (!response.ok) throw new Error("The example cannot be loaded. Load the page again.");
  return response.blob();
}
