// relay-stream: reads relay's streams, each frame once and none skipped, over any number of connections,
// reloads and tabs. PROTOCOL.md is the wire contract; relay-stream.d.ts says what may be called.
//
// The way of a frame: Reader (connections, one after the other) → Subscription (the cursor decides what is
// new) → other tabs, by a BroadcastChannel, and the callbacks or the iterator here.

/** The first pause before a reconnect, until relay says its own. */
const RETRY_MS = 1000;
/** No pause is longer, however often it failed. */
const RETRY_MAX_MS = 30_000;
/** relay sends a heartbeat every 15 s: a connection that is silent for three of them is dead. */
const SILENCE_MS = 45_000;
/** A leading tab answers at once, unless the browser has put it to sleep. */
const ANSWER_MS = 1000;
/** The lock of a stream that has ended is kept so long, or the next tab would take over and ask once more. */
const AFTER_END_MS = 1000;
/** What is wrong with so many answers in a row is no accident of one connection. */
const WRONG_MAX = 3;
/** Messages that wait for a slow iterator, before the connection is given up until it has caught up. */
const QUEUE_MAX = 1000;
/** How often an `ask` is made whose answer was lost on the way. */
const ASKS_MAX = 5;

// Browsers hold six HTTP/1.1 connections to a host, over all tabs. Two of them stay free for other requests.
const FRONT_SLOTS = ["relay-stream front 1", "relay-stream front 2"];
const BACK_SLOTS = ["relay-stream back 1", "relay-stream back 2"];
/** How often a connection looks whether others wait for its slot. */
const TURN_MS = 500;
/** A connection on which frames come keeps its slot so long. */
const BUSY_TURN_MS = 10_000;
/** One that is not answered keeps it so long: the way may be long, or the stream not be there yet. */
const UNANSWERED_TURN_MS = 5000;
/** A chat that had nothing new in several turns asks for one this often. */
const IDLE_PAUSE_MAX_MS = 5000;

/** Control frames of one connection. Those that are not here are in the journal and have a seq. */
const OF_CONNECTION = new Set(["hello", "gap", "reset", "live", "bye", "heartbeat"]);
/** Refusals that may be over soon. Other 4xx say that the same request is never granted. */
const PASSING = new Set([408, 425, 429]);

// --- the format --------------------------------------------------------------------------------------------

/** An incremental parser of `text/event-stream` (WHATWG HTML, 9.2.6). */
export class EventStreamParser {
  /** The last `retry:`, null before there was one. */
  retryMs = null;
  #decoder = new TextDecoder(); // drops a byte order mark, and holds back a character cut by the chunk's end
  #partial = "";
  #afterCr = false; // a LF that comes next belongs to the line end already seen
  #id = "";
  #event = "";
  #data = null;

  /** The events that these bytes complete: `{id, event, data}`, `event` is "" when none was named. */
  push(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (this.#afterCr && text) {
      this.#afterCr = false;
      if (text[0] === "\n") text = text.slice(1);
    }
    const events = [];
    const lineEnd = /\r\n|\n|\r/g;
    let begin = 0;
    for (let found; (found = lineEnd.exec(text)); begin = lineEnd.lastIndex) {
      this.#line(this.#partial + text.slice(begin, found.index), events);
      this.#partial = "";
      // A CR ends its line now, not when it is known what follows: the event would be late by a chunk.
      this.#afterCr = found[0] === "\r" && lineEnd.lastIndex === text.length;
    }
    this.#partial += text.slice(begin);
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data !== null) events.push({ id: this.#id, event: this.#event, data: this.#data });
      this.#event = "";
      this.#data = null;
      return;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon); // a comment has the empty name
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value[0] === " ") value = value.slice(1);
    if (name === "data") this.#data = this.#data === null ? value : `${this.#data}\n${value}`;
    else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^[0-9]{1,9}$/.test(value)) this.retryMs = Number(value);
  }
}

/** A frame object of `envelope=json` as the event it stands for. */
function unwrapped({ id, data }) {
  const frame = JSON.parse(data);
  // An event stream knows no other line end than LF, and what is read should not depend on the envelope.
  return { ...frame, id: frame.id ?? id, data: frame.data.replace(/\r\n?/g, "\n") };
}

// --- the cursor --------------------------------------------------------------------------------------------

const seqOf = (id) => Number(id.slice(0, id.indexOf("-")));
/** `rly.<token>.<seq>-<ms>`, the id of a proxied answer, as the cursor in it. */
const cursorOf = (id) => id.slice(id.lastIndexOf(".") + 1);

/** Decides by their ids which events are new. `contiguous`: every frame of the stream is to be seen. */
class Sequence {
  constructor(cursor, contiguous) {
    this.cursor = cursor;
    this.contiguous = contiguous;
  }

  /** The message that an event is, null if it is no news. Throws where frames are missing before it. */
  take({ id: rawId, event, data, run, at }) {
    const id = cursorOf(rawId);
    const control = event === "relay" ? JSON.parse(data) : null;
    if (control && OF_CONNECTION.has(control.type)) {
      if (control.type === "heartbeat") return null;
      const loss = control.type === "gap" || control.type === "reset";
      // Who has a cursor believes only a gap or a reset, so that a wrong hello shows as a hole.
      if (id && (loss || this.cursor === null || (!this.contiguous && seqOf(id) > seqOf(this.cursor)))) {
        this.cursor = id;
      }
      return { ...control, id: id || null };
    }
    if (id === "") return { type: "frame", id, event, data }; // not journaled: nothing to go by
    const seq = seqOf(id);
    if (this.cursor !== null) {
      const last = seqOf(this.cursor);
      if (seq <= last) return null;
      if (this.contiguous && seq !== last + 1) throw new Hole(last, seq);
    }
    this.cursor = id;
    if (control) return { ...control, id };
    return { type: "frame", id, event, data, ...(run !== undefined && { run, at }) };
  }
}

class Hole extends Error {
  constructor(last, next) {
    super(`Frames are missing between ${last} and ${next}.`);
  }
}

// --- errors ------------------------------------------------------------------------------------------------

/** A refusal: relay's problem document, or what else stood in its place. */
export class RelayError extends Error {
  constructor(message, { status = 0, code = "", problem = null, retryAfterMs = null } = {}) {
    super(message);
    this.name = "RelayError";
    this.status = status;
    this.code = code;
    this.problem = problem;
    this.retryAfterMs = retryAfterMs;
  }

  /** Whether the same request may be granted later. */
  get passing() {
    return PASSING.has(this.status) || !(this.status === 501 || (this.status >= 400 && this.status < 500));
  }

  static async of(response) {
    const text = await response.text().catch(() => "");
    let problem = null;
    try {
      problem = JSON.parse(text);
    } catch {} // not relay's own answer
    const after = response.headers.get("Retry-After");
    const seconds = /^[0-9]+$/.test(after ?? "");
    const afterMs = seconds ? Number(after) * 1000 : Date.parse(after ?? "") - Date.now();
    const says = problem?.detail ?? problem?.title ?? (text.length < 500 && text);
    return new RelayError(says || `${response.status} ${response.statusText}`.trim(), {
      status: response.status,
      code: problem?.code ?? "",
      problem,
      retryAfterMs: Number.isNaN(afterMs) ? null : Math.max(0, afterMs),
    });
  }
}

const NOT_A_STREAM = "not_a_stream";
const notAStream = ({ status }) =>
  new RelayError("The answer is no event stream.", { status, code: NOT_A_STREAM });

// --- requests ----------------------------------------------------------------------------------------------

/** Where relay is and how it is asked: what `subscribe`, `ask` and `cancel` have in common. */
class Address {
  constructor({ url = "", headers, credentials = "same-origin", fetch } = {}) {
    this.url = String(url).replace(/\/$/, "");
    this.credentials = credentials;
    this.fetch = fetch ?? ((...args) => globalThis.fetch(...args));
    this.#headers = headers;
  }

  #headers;

  /** The caller's headers, asked for anew each time, since a token may have been renewed. */
  async headers(more) {
    const headers = new Headers(typeof this.#headers === "function" ? await this.#headers() : this.#headers);
    for (const [name, value] of Object.entries(more)) headers.set(name, value);
    return headers;
  }

  stream(name) {
    return `${this.url}/relay/v1/streams/${encodeURIComponent(name)}`;
  }
}

/** Stop a run, or the stream's newest open one. What was said stays. Returns the run as it ended. */
export async function cancel(stream, { run, reason, signal, ...options } = {}) {
  const address = new Address(options);
  const path = run === undefined ? "cancel" : `runs/${encodeURIComponent(run)}/cancel`;
  const response = await address.fetch(`${address.stream(stream)}/${path}`, {
    method: "POST",
    headers: await address.headers(reason === undefined ? {} : { "Content-Type": "application/json" }),
    credentials: address.credentials,
    body: reason === undefined ? undefined : JSON.stringify({ reason }),
    signal,
  });
  if (!response.ok) throw await RelayError.of(response);
  return response.json();
}

/** Full jitter: clients that were cut together do not come back together. */
const jittered = (retryMs, failures) => Math.random() * Math.min(RETRY_MAX_MS, retryMs * 2 ** failures);

/** Resolves after `ms`, or when the signal says so. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
    if (signal.aborted) done();
  });
}

// --- slots -------------------------------------------------------------------------------------------------

/** Elsewhere there are no tabs, and as many connections as one likes. */
const inBrowser = () => typeof document !== "undefined" || typeof WorkerGlobalScope !== "undefined";

const hidden = () => globalThis.document?.visibilityState === "hidden";

/** Whether connections to this address are known to share one (HTTP/2, HTTP/3), so that none need wait. */
function multiplexed(url) {
  const { origin } = new URL(url || "/", globalThis.document?.baseURI ?? globalThis.location.href);
  const entries = (type) => globalThis.performance?.getEntriesByType?.(type) ?? [];
  return [...entries("navigation"), ...entries("resource")].some(
    (entry) => entry.name.startsWith(`${origin}/`) && /^h[23]/.test(entry.nextHopProtocol),
  );
}

/** One of the few connections that all tabs of the origin may hold. Pages that are looked at have two to
 * themselves. Resolves with null when the signal ended the wait. */
async function takeSlot(signal) {
  const wait = new AbortController();
  const withdraw = () => wait.abort();
  signal.addEventListener("abort", withdraw);
  const names = hidden() ? BACK_SLOTS : [...FRONT_SLOTS, ...BACK_SLOTS];
  const slot = await new Promise((resolve) => {
    let taken = false;
    const requests = names.map((name) =>
      navigator.locks.request(name, { signal: wait.signal }, () => {
        if (taken) return undefined; // granted in the same moment as another: given back at once
        taken = true;
        wait.abort();
        return new Promise((release) => resolve({ name, release, since: Date.now() }));
      }),
    );
    Promise.allSettled(requests).then(() => resolve(null));
    if (signal.aborted) withdraw();
  });
  signal.removeEventListener("abort", withdraw);
  return slot;
}

async function isWaitedFor(slot) {
  const { pending } = await navigator.locks.query();
  return pending.some((lock) => lock.name === slot.name);
}

// --- connections -------------------------------------------------------------------------------------------

/** Reads a stream by one connection after the other, until an end or until it is stopped.
 *
 * `hooks.cursor()` is where to go on; `hooks.events(events)` gets what came and returns a verdict, `{end}`
 * or `{waitMs}`, where the connection is over; `hooks.state`, `hooks.quiet` and `hooks.end` say how it is. */
class Reader {
  #request;
  #hooks;
  #stopped = new AbortController();
  #visit = null; // the connection under way
  #pause = null; // what ends the pause, or the wait for a slot, that is under way
  #heardAt = 0;
  #framesAt = 0;
  #answered = false;
  #hadNews = false; // on this connection
  #retryMs = RETRY_MS;
  #leaveMs = undefined; // the pause after a connection that was left on purpose
  #idleTurns = 0;
  #wrong = 0;
  #byFetch = false; // an EventSource was refused, and does not say why
  #slot = null;

  constructor(request, hooks) {
    this.#request = request;
    this.#hooks = hooks;
    this.#run();
  }

  stop() {
    this.#stopped.abort();
  }

  /** There may be a way now: end a pause. `afresh` gives up a connection too, which may be dead unseen. */
  wake(afresh) {
    this.#pause?.abort();
    if (this.#visit && (afresh || this.#isSilent())) this.#leave(0);
  }

  /** The page is not looked at any more: its slot is for those that are. */
  stepBack() {
    if (FRONT_SLOTS.includes(this.#slot?.name)) this.#leave(0);
  }

  #isSilent() {
    return Date.now() - this.#heardAt > this.#request.silenceMs;
  }

  #leave(waitMs) {
    this.#leaveMs = waitMs;
    this.#visit?.abort();
  }

  #say(state, error) {
    if (!this.#stopped.signal.aborted) this.#hooks.state(state, error);
  }

  async #run() {
    const { signal } = this.#stopped;
    let failures = 0;
    while (!signal.aborted) {
      if (this.#request.slots && !this.#request.answer) {
        this.#say("queued");
        const woken = await this.#pausing(async (pausing) => (this.#slot = await takeSlot(pausing)));
        if (signal.aborted) this.#slot?.release();
        if (woken && !this.#slot) continue; // there may be other slots for it now
      }
      if (signal.aborted) return;
      const outcome = await this.#connect();
      this.#slot?.release();
      this.#slot = null;
      if (signal.aborted) return;
      if (outcome.end) {
        this.#hooks.end(outcome.end, outcome.error);
        return;
      }
      failures = outcome.heard ? 0 : failures + 1;
      const waitMs = outcome.waitMs ?? jittered(this.#retryMs, failures);
      this.#say("waiting", outcome.error);
      await this.#pausing((pausing) => pause(waitMs, pausing));
    }
  }

  /** Wait for something that `stop` and `wake` end; whether they did. */
  async #pausing(wait) {
    const pausing = (this.#pause = new AbortController());
    const stop = () => pausing.abort();
    this.#stopped.signal.addEventListener("abort", stop);
    await wait(pausing.signal);
    this.#stopped.signal.removeEventListener("abort", stop);
    this.#pause = null;
    return pausing.signal.aborted;
  }

  /** One connection; how it went: `{end, error}`, or `{heard, waitMs, error}` and another one follows. */
  async #connect() {
    const visit = (this.#visit = new AbortController());
    const stop = () => visit.abort();
    this.#stopped.signal.addEventListener("abort", stop);
    this.#heardAt = Date.now();
    this.#answered = this.#hadNews = false;
    this.#leaveMs = undefined;
    let heard = false;
    const opened = () => {
      heard = this.#answered = true; // relay can be reached; cuts now and then need not wait ever longer
      this.#framesAt = Date.now();
      this.#say("open");
    };
    const alive = (events) => {
      this.#heardAt = Date.now();
      if (events.length === 0) return this.#hooks.quiet();
      if (events.some(({ event }) => event !== "relay")) {
        this.#framesAt = this.#heardAt;
        this.#hadNews = true;
      }
      return this.#hooks.events(events);
    };
    const tickMs = this.#slot ? TURN_MS : Math.min(5000, this.#request.silenceMs);
    const watch = setInterval(() => this.#watch(), tickMs);
    this.#say("connecting");
    const byEventSource = this.#request.eventSource && !this.#byFetch && !this.#request.answer;
    try {
      const verdict = byEventSource
        ? await this.#byEventSource(visit.signal, alive, opened)
        : await this.#byFetchOf(visit.signal, alive, opened);
      if (verdict?.end) return verdict;
      this.#wrong = 0;
      return { heard, waitMs: verdict?.waitMs ?? this.#leaveMs };
    } catch (error) {
      if (error instanceof RelayError && !error.passing) return { end: "error", error };
      // A head that was cut has no content type, or half a one: browsers take it for whole over plain HTTP.
      const wrong = error instanceof Hole || error.code === NOT_A_STREAM;
      this.#wrong = wrong ? this.#wrong + 1 : 0;
      if (this.#wrong >= WRONG_MAX) return { end: "error", error };
      if (visit.signal.aborted) return { heard, waitMs: this.#leaveMs };
      if (!this.#request.resumable) return { end: "error", error };
      const asked = error instanceof RelayError ? error.retryAfterMs : null;
      return { heard, error, waitMs: asked === null ? undefined : asked + jittered(this.#retryMs, 0) };
    } finally {
      clearInterval(watch);
      this.#stopped.signal.removeEventListener("abort", stop);
      visit.abort();
      if (this.#visit === visit) this.#visit = null;
    }
  }

  async #watch() {
    if (this.#isSilent()) {
      this.#visit?.abort();
      return;
    }
    const slot = this.#slot;
    if (!slot) return;
    const now = Date.now();
    const longestMs = this.#answered ? BUSY_TURN_MS : UNANSWERED_TURN_MS;
    const done = (this.#answered && now - this.#framesAt >= TURN_MS) || now - slot.since >= longestMs;
    if (!done || !(await isWaitedFor(slot)) || slot !== this.#slot) return;
    // Whoever had nothing to read asks again later each time, so that quiet chats do not keep relay busy.
    this.#idleTurns = this.#hadNews ? 0 : this.#idleTurns + 1;
    this.#leave(this.#idleTurns ? Math.min(IDLE_PAUSE_MAX_MS, TURN_MS * 2 ** this.#idleTurns) : 0);
  }

  async #byFetchOf(signal, alive, opened) {
    this.#byFetch = false;
    const first = this.#request.answer;
    this.#request.answer = null;
    const response = first ?? (await this.#request.fetch(this.#hooks.cursor(), signal));
    if (response.status === 204) return { end: "ended" };
    if (!response.ok) throw await RelayError.of(response);
    if (!/^text\/event-stream\b/i.test(response.headers.get("Content-Type") ?? "")) {
      throw notAStream(response);
    }
    opened();
    const body = response.body.getReader();
    const leave = () => body.cancel().catch(() => {});
    signal.addEventListener("abort", leave);
    const parser = new EventStreamParser();
    const unwrap = this.#request.envelope && !first;
    try {
      for (;;) {
        const { done, value } = await body.read();
        if (signal.aborted) return null;
        if (done && first) return this.#request.resumable ? { waitMs: 0 } : { end: "ended" };
        if (done) return null;
        const events = parser.push(value);
        this.#retryMs = parser.retryMs ?? this.#retryMs;
        const verdict = alive(unwrap ? events.map(unwrapped) : events);
        if (verdict) return verdict;
      }
    } finally {
      signal.removeEventListener("abort", leave);
      leave();
    }
  }

  #byEventSource(signal, alive, opened) {
    return new Promise((resolve, reject) => {
      const source = this.#request.source(this.#hooks.cursor());
      const finish = (settle, value) => {
        source.close();
        settle(value);
      };
      signal.addEventListener("abort", () => finish(resolve, null));
      source.onopen = opened;
      source.onmessage = (message) => {
        try {
          const verdict = alive([unwrapped({ id: message.lastEventId, data: message.data })]);
          if (verdict) finish(resolve, verdict);
        } catch (error) {
          finish(reject, error);
        }
      };
      source.onerror = () => {
        // It would come back by itself, but not with jitter, and not where another tab may do it instead.
        this.#byFetch = source.readyState === source.CLOSED;
        finish(resolve, this.#byFetch ? { waitMs: 0 } : null);
      };
      if (signal.aborted) finish(resolve, null);
    });
  }
}

/** What a reader asks for. `answer` is a response that is here already and is read first. */
class ReadRequest {
  constructor(stream, options, answer = null) {
    this.stream = stream;
    this.resumable = stream !== null;
    this.run = options.run;
    this.answer = answer;
    this.eventSource = Boolean(options.eventSource) && typeof EventSource !== "undefined";
    this.envelope = Boolean(options.envelope) || this.eventSource;
    this.silenceMs = options.silenceMs ?? SILENCE_MS;
    this.#address = new Address(options);
    this.#tail = options.after === "tail";
    this.#wait = options.wait;
    this.shared = options.share !== false && inBrowser() && Boolean(navigator.locks);
    this.slots = this.shared && !multiplexed(this.#address.url);
  }

  #address;
  #tail;
  #wait;

  /** Subscriptions with equal keys are shown the same; null for one that means another run each time. */
  get key() {
    if (!this.shared || typeof BroadcastChannel === "undefined") return null;
    if (this.run === "current" || this.run === "latest") return null;
    return JSON.stringify([this.#address.stream(this.stream), this.run, this.#tail, this.envelope]);
  }

  url(more = {}) {
    const query = new URLSearchParams(more);
    if (this.run !== undefined) query.set("run", this.run);
    if (this.#wait !== undefined) query.set("wait", this.#wait);
    if (this.envelope) query.set("envelope", "json");
    const text = query.toString();
    return `${this.#address.stream(this.stream)}/events${text && `?${text}`}`;
  }

  async fetch(cursor, signal) {
    const resume = cursor === null ? {} : { "Last-Event-ID": cursor };
    return this.#address.fetch(this.url(cursor === null && this.#tail ? { after: "tail" } : {}), {
      headers: await this.#address.headers({ Accept: "text/event-stream", ...resume }),
      credentials: this.#address.credentials,
      cache: "no-store",
      signal,
    });
  }

  source(cursor) {
    const after = cursor ?? (this.#tail ? "tail" : "start");
    return new EventSource(this.url({ after, heartbeat: "event" }), {
      withCredentials: this.#address.credentials === "include",
    });
  }
}

// --- subscriptions -----------------------------------------------------------------------------------------

/** Read a stream's frames. See relay-stream.d.ts for the options. */
export function subscribe(stream, options = {}) {
  return new Subscription(new ReadRequest(stream, options), options);
}

class Subscription {
  /** Resolves when it is over, never rejects: `{reason, error?}`. */
  done;
  state = "connecting";
  /** "alone"; with other tabs "leader", which reads for all, or "follower". */
  role = "alone";
  /** The id of the last frame that was handed out. */
  cursor;

  #request;
  #options;
  #sequence;
  #reader = null;
  #tabs = null;
  #synced = false; // a follower that stands where its leader does needs no connection of its own
  #heldBy = new Set();
  #over = null;
  #resolveDone;
  #queue = null; // of the iterator, once there is one
  #takers = [];
  #unlisten = [];

  constructor(request, options) {
    this.#request = request;
    this.#options = options;
    this.cursor = this.#storedCursor() ?? (/-/.test(options.after ?? "") ? options.after : null);
    this.#sequence = new Sequence(this.cursor, request.run === undefined && !request.answer);
    this.done = new Promise((resolve) => (this.#resolveDone = resolve));
    this.#listen();
    // Later, so that the caller has the subscription, and an iterator, before anything is called back.
    queueMicrotask(() => this.#begin());
  }

  /** Leave. The run goes on: leaving is not stopping. */
  close() {
    this.#finish("closed");
  }

  /** Stop the run that is read, or the stream's newest open one. */
  async cancel(reason) {
    if (!this.#request.resumable)
      throw new RelayError("This stream is not journaled.", { code: NOT_A_STREAM });
    const run = ["current", "latest"].includes(this.#request.run) ? undefined : this.#request.run;
    return cancel(this.#request.stream, { ...this.#options, signal: undefined, run, reason });
  }

  [Symbol.asyncIterator]() {
    this.#queue ??= [];
    return {
      next: async () => {
        while (this.#queue.length === 0 && !this.#over) {
          await new Promise((resolve) => this.#takers.push(resolve));
        }
        if (this.#queue.length > 0) {
          const [message, cursor] = this.#queue.shift();
          this.cursor = cursor;
          this.#storeCursor();
          if (this.#queue.length === 0) this.#release("slow iterator");
          return { done: false, value: message };
        }
        if (this.#over.error) throw this.#over.error;
        return { done: true, value: undefined };
      },
      return: async () => {
        this.close();
        return { done: true, value: undefined };
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  // Beginning, pausing and ending

  #begin() {
    if (this.#over || this.#heldBy.size > 0 || this.#reader || this.#tabs) return;
    const { key } = this.#request;
    if (key === null) this.#read();
    else this.#tabs = new Tabs(key, this);
  }

  #read() {
    this.#reader ??= new Reader(this.#request, {
      cursor: () => this.#sequence.cursor,
      events: (events) => this.#received(events),
      quiet: () => this.#tellPosition(),
      state: (state, error) => this.#say(state, error),
      end: (reason, error) => this.#finish(reason, error),
    });
  }

  #stopReading() {
    this.#reader?.stop();
    this.#reader = null;
  }

  /** Hold no connection, lock or channel for as long as there is a reason not to. */
  #hold(reason) {
    if (this.#over) return;
    this.#heldBy.add(reason);
    this.#stopReading();
    this.#tabs?.leave();
    this.#tabs = null;
    this.#synced = false;
    this.role = "alone";
    this.#say("suspended");
  }

  #release(reason) {
    if (this.#heldBy.delete(reason)) this.#begin();
  }

  #finish(reason, error) {
    if (this.#over) return;
    this.#over = error === undefined ? { reason } : { reason, error };
    this.#stopReading();
    this.role = "alone";
    if (reason === "ended" || reason === "deleted") this.#tabs?.end(reason, this.#sequence.cursor);
    else this.#tabs?.leave();
    for (const unlisten of this.#unlisten) unlisten();
    this.#say("closed", error);
    if (error !== undefined) this.#call("onError", error);
    this.#call("onEnd", this.#over);
    this.#resolveDone(this.#over);
    this.#wakeTakers();
  }

  #listen() {
    const on = (target, name, handler) => {
      if (!target?.addEventListener) return;
      target.addEventListener(name, handler);
      this.#unlisten.push(() => target.removeEventListener(name, handler));
    };
    const { document } = globalThis;
    const look = (afresh) => (this.#reader ? this.#reader.wake(afresh) : this.#tabs?.ask());
    on(globalThis, "online", () => look(true));
    on(document, "resume", () => look(false));
    on(document, "visibilitychange", () => (hidden() ? this.#reader?.stepBack() : look(false)));
    // A page that holds a connection or a lock is not kept for Back. One that was kept takes up from its
    // cursor.
    if (document) {
      on(globalThis, "pagehide", () => this.#hold("page"));
      on(globalThis, "pageshow", () => this.#release("page"));
    }
    const { signal } = this.#options;
    if (signal?.aborted) this.#finish("closed");
    else on(signal, "abort", () => this.#finish("closed"));
  }

  // What comes

  /** Events of this tab's own connection; a verdict if it is over with them. */
  #received(events) {
    const told = new Batches();
    const news = [];
    let hole = null;
    for (const event of events) {
      const before = this.#sequence.cursor;
      try {
        const message = this.#sequence.take(event);
        if (message === null) continue;
        news.push([message, this.#sequence.cursor]);
        told.add(event, before, this.#sequence.cursor, OF_CONNECTION.has(message.type));
      } catch (error) {
        if (!(error instanceof Hole)) throw error;
        hole = error;
        break;
      }
    }
    if (this.role === "leader") for (const batch of told.batches) this.#tabs.post(batch);
    this.#handOut(news);
    if (hole) throw hole;
    return this.#verdict(news);
  }

  #verdict(news) {
    for (const [message] of news) {
      if (message.type === "run.ended" && this.#request.run !== undefined) return { end: "ended" };
      if (message.type !== "bye") continue;
      if (message.reason === "ended" || message.reason === "deleted") return { end: message.reason };
      return { waitMs: message.retry_ms };
    }
    return null;
  }

  #handOut(news) {
    for (const [message, cursor] of news) {
      if (this.#over) break;
      // `current` means another run later on: this reader stays with the one that it was given.
      const run = message.type === "run.started" || message.type === "frame" ? message.run : undefined;
      if (run && (this.#request.run === "current" || this.#request.run === "latest")) this.#request.run = run;
      if (this.#queue) this.#queue.push([message, cursor]);
      else this.cursor = cursor;
      this.#call(message.type === "frame" ? "onFrame" : "onControl", message);
    }
    if (news.length === 0) return;
    if (!this.#queue) this.#storeCursor();
    this.#wakeTakers();
    if (this.#queue?.length > QUEUE_MAX) this.#hold("slow iterator");
  }

  #wakeTakers() {
    for (const taker of this.#takers.splice(0)) taker();
  }

  #say(state, error) {
    if (state === this.state && error === undefined) return;
    this.state = state;
    this.#call("onState", state, error);
    this.#tellPosition();
  }

  /** A callback's mistake is its own: it is reported as one that nobody caught, and reading goes on. */
  #call(name, ...args) {
    try {
      this.#options[name]?.(...args);
    } catch (error) {
      setTimeout(() => {
        throw error;
      });
    }
  }

  // Even to look at a storage that is forbidden throws; then the cursor lives as long as the page.

  #storedCursor() {
    const { store } = this.#options;
    try {
      return store ? (store.area ?? sessionStorage).getItem(store.key) : null;
    } catch {
      return null;
    }
  }

  #storeCursor() {
    const { store } = this.#options;
    try {
      if (store && this.cursor !== null) (store.area ?? sessionStorage).setItem(store.key, this.cursor);
    } catch {} // or it is full
  }

  // Among tabs. Each has a cursor of its own; the leader's frames are taken only where they go on from it.

  /** The lock is this tab's: it reads for all from now on. */
  lead() {
    this.role = "leader";
    this.#synced = false;
    this.#read();
    this.#tellPosition();
  }

  follow() {
    if (this.role !== "leader") this.role = "follower";
  }

  /** Read by a connection of its own, until what the leader tells goes on from here. */
  catchUp() {
    if (this.role !== "leader" && !this.#over) {
      this.#synced = false;
      this.#read();
    }
  }

  /** A message of another tab. */
  hear(message) {
    if (this.#over) return;
    if (this.role === "leader") {
      if (message.kind === "who") this.#tellPosition();
    } else if (message.kind === "at") this.#hearPosition(message);
    else if (message.kind === "frames") this.#hearFrames(message);
    else if (message.kind === "control") this.#hearControl(message);
    else if (message.kind === "end" && this.#synced) {
      if (message.cursor === this.#sequence.cursor) this.#finish(message.reason);
      else this.catchUp();
    }
  }

  #tellPosition() {
    if (this.role === "leader") {
      this.#tabs?.post({ kind: "at", cursor: this.#sequence.cursor, state: this.state, hidden: hidden() });
    }
  }

  #hearPosition({ cursor, state, hidden: unseen }) {
    const mine = this.#sequence.cursor;
    if (mine === null && cursor !== null && this.#options.after === "tail") this.#sequence.cursor = cursor;
    // A hidden leader may wait long for a slot that a page which is looked at gets at once.
    const starved = unseen && state === "queued" && !hidden();
    if (this.#sequence.cursor === cursor && !starved) this.#sync();
    else if (starved || !this.#synced || mine === null || (cursor !== null && seqOf(cursor) > seqOf(mine))) {
      this.catchUp();
    }
    if (this.#synced) this.#say(state);
  }

  #sync() {
    this.#synced = true;
    this.#stopReading();
  }

  #hearFrames({ from, events }) {
    const mine = this.#sequence.cursor;
    const place = from === mine ? 0 : events.findIndex(({ id }) => id === mine) + 1;
    if (from !== mine && place === 0) {
      // A leader that is behind will come; one that is ahead has said what this tab did not hear.
      const behind = mine !== null && seqOf(events.at(-1).id) < seqOf(mine);
      if (this.#synced && !behind) this.catchUp();
      return;
    }
    this.#sync();
    this.#take(events.slice(place));
  }

  #hearControl({ from, to, event }) {
    if (from === this.#sequence.cursor) {
      this.#sync();
      this.#take([event]);
    } else if (this.#synced && from !== to) this.catchUp(); // its loss may not be this tab's
  }

  #take(events) {
    const news = events.map((event) => [this.#sequence.take(event), this.#sequence.cursor]);
    this.#handOut(news.filter(([message]) => message !== null));
  }
}

/** What a leader tells of one chunk: frames that follow each other in one message, control frames between. */
class Batches {
  batches = [];

  add(event, from, to, ofConnection) {
    const last = this.batches.at(-1);
    const plain = { ...event, id: cursorOf(event.id) };
    if (ofConnection) this.batches.push({ kind: "control", from, to, event: plain });
    else if (last?.kind === "frames") last.events.push(plain);
    else this.batches.push({ kind: "frames", from, events: [plain] });
  }
}

/** This tab among those of its origin that read the same: a lock makes one the leader, a channel joins
 * them. */
class Tabs {
  #member;
  #channel;
  #name;
  #withdraw = new AbortController();
  #release = null;
  #unanswered;

  constructor(key, member) {
    this.#member = member;
    this.#name = `relay-stream ${key}`;
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data }) => {
      if (data.kind !== "who") this.#expect(SILENCE_MS);
      member.hear(data);
    };
    navigator.locks
      .request(this.#name, { signal: this.#withdraw.signal }, () => {
        if (this.#withdraw.signal.aborted) return undefined;
        clearTimeout(this.#unanswered);
        return new Promise((release) => {
          this.#release = release;
          member.lead();
        });
      })
      .catch(() => {}); // withdrawn
    member.follow();
    this.ask();
  }

  post(message) {
    this.#channel.postMessage(message);
  }

  /** No reader here any more; the next tab takes over. */
  leave() {
    clearTimeout(this.#unanswered);
    this.#channel.onmessage = null;
    this.#channel.close();
    this.#withdraw.abort();
    this.#release?.();
  }

  end(reason, cursor) {
    if (!this.#release) return this.leave();
    this.post({ kind: "end", reason, cursor });
    clearTimeout(this.#unanswered);
    setTimeout(() => this.leave(), AFTER_END_MS);
  }

  /** Ask the leader where it is. */
  ask() {
    this.post({ kind: "who" });
    clearTimeout(this.#unanswered);
    this.#unanswered = setTimeout(() => this.#member.catchUp(), ANSWER_MS);
  }

  /** A leader that is not heard for so long is asked whether it is still there. */
  #expect(ms) {
    clearTimeout(this.#unanswered);
    if (!this.#release) this.#unanswered = setTimeout(() => this.ask(), ms);
  }
}

// --- asking ------------------------------------------------------------------------------------------------

/** Make a request whose answer is a stream that relay proxies, and read that answer to its end, over cuts.
 *
 * The request gets an Idempotency-Key, so one whose answer was lost is made again without asking the agent
 * twice. Rejects with a RelayError where the answer is a refusal or no stream. */
export async function ask(input, init = {}, options = {}) {
  const { method = "POST", signal } = init;
  const request = new Request(new URL(input, globalThis.location?.href), { ...init, method, signal: null });
  if (!request.headers.has("Accept")) request.headers.set("Accept", "text/event-stream");
  if (!request.headers.has("Idempotency-Key")) request.headers.set("Idempotency-Key", unguessable());
  const response = await answered(request, signal ?? new AbortController().signal, options.fetch);
  const stream = response.headers.get("Relay-Stream");
  const run = response.headers.get("Relay-Run");
  const streams = /^text\/event-stream\b/i.test(response.headers.get("Content-Type") ?? "");
  const journaled = stream !== null && run !== null;
  if (!streams) response.body?.cancel(); // lines have no ids: their run is read as events instead
  if (!streams && !journaled) {
    throw notAStream(response);
  }
  const reading = {
    url: new URL(request.url).origin,
    credentials: request.credentials,
    ...options,
    run: run ?? undefined,
    after: response.headers.get("Relay-Cursor") ?? undefined,
    signal,
    store: undefined,
    share: false,
  };
  // A stream that relay does not journal (`--journal-down passthrough`) is read as far as it comes.
  const wanted = new ReadRequest(journaled ? stream : null, reading, streams ? response : null);
  return new Subscription(wanted, reading);
}

async function answered(request, signal, fetch = globalThis.fetch) {
  for (let failures = 0; ; failures += 1) {
    let waitMs = jittered(RETRY_MS, failures);
    try {
      const response = await fetch(request.clone(), { signal });
      if (response.ok) return response;
      const error = await RelayError.of(response);
      // Without its wish to be asked again, an error is the agent's answer.
      if (error.retryAfterMs === null || !error.passing || failures + 1 >= ASKS_MAX) throw error;
      waitMs = error.retryAfterMs + jittered(RETRY_MS, 0);
    } catch (error) {
      if (signal.aborted || error instanceof RelayError || failures + 1 >= ASKS_MAX) throw error;
    }
    await pause(waitMs, signal);
    signal.throwIfAborted();
  }
}

function unguessable() {
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("-");
}

// --- the AI SDK --------------------------------------------------------------------------------------------

/** A `ChatTransport` for `useChat` whose answers survive cuts and reloads. A chat's stream has its id for a
 * name: relay is started with `--stream-from body:/id`. */
export class RelayChatTransport {
  /** `reconnectToStream` gives the whole answer again, from its first chunk. */
  resumeStreamIsReplay = true;
  #options;

  constructor(options = {}) {
    this.#options = { api: "/api/chat", ...options };
  }

  async sendMessages({ trigger, chatId, messageId, messages, abortSignal, headers, body }) {
    const { api } = this.#options;
    const all = await this.#headers(headers);
    all.set("Content-Type", "application/json");
    all.set("Relay-Stream", chatId);
    // The answer that is given anew ends in every tab, and Stop means the new one at once.
    if (trigger === "regenerate-message") all.set("Relay-Supersedes", "latest");
    const more = typeof this.#options.body === "function" ? await this.#options.body() : this.#options.body;
    const answer = await ask(
      api,
      {
        headers: all,
        body: JSON.stringify({ ...more, ...body, id: chatId, messages, trigger, messageId }),
        credentials: this.#options.credentials,
        signal: abortSignal,
      },
      await this.#reading(all),
    );
    return chunks(answer, answer[Symbol.asyncIterator](), abortSignal);
  }

  async reconnectToStream({ chatId, abortSignal, headers }) {
    const reading = await this.#reading(await this.#headers(headers));
    const answer = subscribe(chatId, { ...reading, run: "current", signal: abortSignal });
    const messages = answer[Symbol.asyncIterator]();
    try {
      if ((await messages.next()).done) return null;
    } catch (error) {
      if (error.status === 404) return null; // nothing was ever asked in this chat
      throw error;
    }
    return chunks(answer, messages, abortSignal);
  }

  /** Stop the answer that is being given. (`stop()` of `useChat` only leaves it.) */
  async cancel(chatId, { headers } = {}) {
    return cancel(chatId, await this.#reading(await this.#headers(headers)));
  }

  async #headers(more) {
    const { headers } = this.#options;
    const all = new Headers(typeof headers === "function" ? await headers() : headers);
    new Headers(more).forEach((value, name) => all.set(name, value));
    return all;
  }

  async #reading(headers) {
    const kept = [...headers].filter(([name]) => !/^(relay-|content-type$)/.test(name));
    const { relay, api, credentials, fetch } = this.#options;
    const url = relay ?? new URL(api, globalThis.location?.href).origin;
    return { url, headers: kept, credentials, fetch };
  }
}

/** The chunks in the frames of one answer. */
function chunks(answer, messages, signal) {
  return new ReadableStream({
    async pull(controller) {
      for (;;) {
        const { done, value: message } = await messages.next();
        if (done) {
          if (signal?.aborted) controller.error(signal.reason);
          else controller.close();
          return;
        }
        if (message.type === "gap" || message.type === "reset") {
          answer.close();
          throw new RelayError("Part of this answer is no longer kept.", { code: message.type });
        }
        if (message.type === "run.ended") {
          if (message.status === "failed" || message.status === "lost") {
            answer.close();
            throw new RelayError(message.error || message.reason, { code: message.reason });
          }
          if (message.status === "cancelled") controller.enqueue({ type: "abort", reason: message.reason });
          answer.close();
          controller.close();
          return;
        }
        if (message.type !== "frame") continue;
        if (message.data === "[DONE]") {
          answer.close();
          controller.close();
        } else controller.enqueue(JSON.parse(message.data));
        return;
      }
    },
    cancel: () => answer.close(),
  });
}
