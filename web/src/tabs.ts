// Tabs after the ARIA practices: arrow keys move between them, and the address stores the open one.

import { find } from "./dom";

export function tabs(root: Document): void {
  const all = [...root.querySelectorAll<HTMLButtonElement>('[role="tab"]')];
  const panelOf = (tab: HTMLButtonElement) => find<HTMLElement>(root, `#${tab.getAttribute("aria-controls")}`);

  const open = (chosen: HTMLButtonElement) => {
    for (const tab of all) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      panelOf(tab).hidden = tab !== chosen;
    }
  };
  const openAddress = () => open(all.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? all[0]);

  for (const [place, tab] of all.entries()) {
    tab.addEventListener("click", () => {
      history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
      open(tab);
    });
    tab.addEventListener("keydown", ({ key }) => {
      const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[key];
      if (to === undefined) return;
      const next = all[(to + all.length) % all.length];
      next.focus();
      next.click();
    });
  }
  addEventListener("hashchange", openAddress);
  openAddress();
}
