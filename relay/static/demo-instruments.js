// The instruments: counts what the page is handed, and shows it. relay-stream.js is not asked whether it did
// well; the numbers of the frames tell.

const MARKS_MAX = 240;
const EVENTS_MAX = 200;
const LAGS_MAX = 20;

/** The tabs of a browser share one connection to a stream. */
const ROLES = { leader: "for all tabs", follower: "through another tab", alone: "for itself" };

const $ = (id) => document.getElementById(id);
const seqOf = (id) => Number(id.split("-")[0]);
const msOf = (id) => Number(id.split("-")[1]);

export class Instruments {
  #seen = { frames: 0, duplicates: 0, gaps: 0, reconnects: 0 };
  #last = null; // the seq of the last frame, or where the first one follows
  #cursor = "0-0";
  #lags = [];
  #unmeasured = null; // the id of a live frame that is not drawn yet
  #group = null; // the line of the log that counts frames
  #willShow = false;

  /** A frame of the journal. `caughtUp`: it was written before this page came, or came back. */
  frame(id, caughtUp, isControl) {
    const seq = seqOf(id);
    if (this.#last !== null && seq <= this.#last) this.#seen.duplicates += 1;
    else if (this.#last !== null && seq > this.#last + 1) this.#seen.gaps += 1;
    this.#seen.frames += 1;
    this.#last = Math.max(seq, this.#last ?? 0);
    this.#cursor = id;
    if (!caughtUp) this.#unmeasured = id;
    this.#mark(caughtUp ? "replayed" : "live");
    if (!isControl) this.#count(seq);
    this.#showSoon();
  }

  /** relay said where the next frame follows: at the beginning, or behind a loss. */
  position(id, isLoss) {
    if (isLoss) this.#seen.gaps += 1;
    if (isLoss || this.#last === null) this.#last = seqOf(id);
    this.#showSoon();
  }

  /** live, replaying, connecting, reconnecting, offline, ended */
  connection(state, role) {
    const before = document.body.dataset.connection;
    const wasAway = before === "offline" || before === "reconnecting";
    if (wasAway && (state === "live" || state === "replaying")) this.#seen.reconnects += 1;
    document.body.dataset.connection = state;
    $("state").textContent = state;
    $("role").textContent = ROLES[role] ?? "–";
    this.#showSoon();
  }

  calls(number) {
    $("calls").textContent = number ?? "unknown";
  }

  /** A line of the event log. */
  event(id, name, detail = "") {
    this.#group = null;
    this.#line(id ? String(seqOf(id)) : "", name, detail);
  }

  #count(seq) {
    this.#group ??= { line: this.#line("", "", ""), first: seq, frames: 0 };
    const { line, first } = this.#group;
    this.#group.frames += 1;
    line.children[0].textContent = first === seq ? `${seq}` : `${first}–${seq}`;
    line.children[1].textContent = this.#group.frames === 1 ? "1 frame" : `${this.#group.frames} frames`;
  }

  #line(...parts) {
    const line = document.createElement("li");
    for (const part of parts) line.appendChild(document.createElement("span")).textContent = part;
    if (parts[1]) line.className = "event";
    $("log").prepend(line);
    if ($("log").childElementCount > EVENTS_MAX) $("log").lastChild.remove();
    return line;
  }

  #mark(kind) {
    $("tape").appendChild(document.createElement("i")).className = kind;
    if ($("tape").childElementCount > MARKS_MAX) $("tape").firstChild.remove();
  }

  /** Frames that came together are shown together. */
  #showSoon() {
    if (!this.#willShow) queueMicrotask(() => this.#show());
    this.#willShow = true;
  }

  #show() {
    this.#willShow = false;
    for (const [name, number] of Object.entries(this.#seen)) $(name).textContent = number;
    for (const name of ["duplicates", "gaps"]) $(name).className = this.#seen[name] ? "bad" : "good";
    [$("seq").textContent, $("ms").textContent] = [seqOf(this.#cursor), `-${msOf(this.#cursor)}`];
    if (this.#unmeasured) {
      this.#lags = [Date.now() - msOf(this.#unmeasured), ...this.#lags].slice(0, LAGS_MAX);
      const mean = this.#lags.reduce((sum, lag) => sum + lag) / this.#lags.length;
      $("lag").textContent = mean < 0 ? "clocks differ" : `${mean.toFixed(mean < 10 ? 1 : 0)} ms`;
      this.#unmeasured = null;
    }
  }
}
