// The status area of a panel: progress, cancel button, error and result of a computation.

export interface Report {
  /** Fraction that is done, 0 to 1; undefined if unknown. */
  (text: string, done?: number): void;
}

export class Job {
  private readonly bar = document.createElement("progress");
  private readonly text = document.createElement("span");
  private readonly cancel = document.createElement("button");
  private readonly busy = document.createElement("div");
  private readonly status = document.createElement("p");
  private readonly error = document.createElement("p");
  private running: AbortController | undefined;

  constructor(root: HTMLElement) {
    this.bar.max = 1;
    this.bar.setAttribute("aria-label", "Progress");
    this.cancel.type = "button";
    this.cancel.textContent = "Cancel";
    this.cancel.addEventListener("click", () => this.running?.abort(new Cancelled()));
    this.busy.className = "busy";
    this.busy.hidden = true;
    this.busy.append(this.bar, this.text, this.cancel);
    this.status.className = "status";
    this.status.setAttribute("role", "status");
    this.error.className = "error";
    this.error.setAttribute("role", "alert");
    root.append(this.busy, this.status, this.error);
  }

  /**
   * Do some work, in place of what was running before.
   *
   * @param work Gives the words to show at its end.
   */
  async run(work: (signal: AbortSignal, report: Report) => Promise<string>): Promise<void> {
    this.running?.abort(new Replaced());
    const own = (this.running = new AbortController());
    this.status.textContent = this.error.textContent = "";
    const report: Report = (text, done) => {
      if (this.running !== own) return;
      this.busy.hidden = false;
      this.text.textContent = text;
      if (done === undefined) this.bar.removeAttribute("value");
      else this.bar.value = done;
    };
    try {
      const found = await work(own.signal, report);
      if (this.running === own) this.status.textContent = found;
    } catch (error) {
      if (this.running !== own) return;
      if (error instanceof Cancelled) this.status.textContent = "Cancelled.";
      else this.error.textContent = error instanceof Error ? error.message : String(error);
    } finally {
      if (this.running === own) {
        this.running = undefined;
        this.busy.hidden = true;
      }
    }
  }
}

class Cancelled extends Error {}
class Replaced extends Error {}
