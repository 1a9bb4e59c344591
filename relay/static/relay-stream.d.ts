// Types of relay-stream.js. Needs the lib "dom".

/** An id is `<seq>-<ms>`; the id of the last frame that a reader has is its cursor. */
export type Cursor = string;

/** A frame of a producer. */
export interface Frame {
  type: "frame";
  id: Cursor;
  /** The event's name, "" when it has none. */
  event: string;
  data: string;
  /** Its run and the time it was journaled, with the option `envelope`. */
  run?: string;
  at?: string;
}

export type RunStatus = "completed" | "failed" | "cancelled" | "lost";

/** What relay itself says. Those of runs are in the journal; the others are of one connection. */
export type Control =
  | { type: "run.started"; id: Cursor; run: string; dialect?: string; metadata?: unknown }
  | {
      type: "run.ended";
      id: Cursor;
      run: string;
      status: RunStatus;
      reason: string;
      error?: string;
      frames: number;
      text_bytes: number;
    }
  | { type: "run.superseded"; id: Cursor; run: string; by: string }
  /** First on every connection. `resumed`: the cursor was honoured. */
  | {
      type: "hello";
      id: Cursor;
      stream: string;
      cursor: Cursor;
      earliest: Cursor | null;
      top: Cursor;
      resumed: boolean;
    }
  /** Frames behind the cursor are no longer kept; the earliest that is follows. */
  | { type: "gap"; id: Cursor; requested: Cursor; earliest: Cursor | null }
  /** The cursor is from another life of the stream, which follows from its earliest frame. Show it anew. */
  | { type: "reset"; id: Cursor; reason: "recreated" | "diverged" | "ahead" }
  /** What was said before is all here; what follows is live. */
  | { type: "live"; id: Cursor; cursor: Cursor }
  | {
      type: "bye";
      id: Cursor | null;
      reason: "ended" | "drain" | "rotate" | "slow" | "revoked" | "deleted" | "busy" | "not_yet";
      retry_ms: number;
    };

export type Message = Frame | Control;

/**
 * `queued`: waits for one of the few connections that the tabs of an origin share. `connecting`, `open`.
 * `waiting`: a pause before the next try. `suspended`: the page is not shown, or its iterator is slow.
 */
export type State = "queued" | "connecting" | "open" | "waiting" | "suspended" | "closed";

/** How it ended: by itself, because the stream was deleted, by `close`, or by an error. */
export interface End {
  reason: "ended" | "deleted" | "closed" | "error";
  error?: Error;
}

/** Where relay is, and how it is asked. */
export interface AddressOptions {
  /** What stands before `/relay/v1/…`; "" is the page's own origin. */
  url?: string | URL;
  /** Sent with each request; a function is asked each time, so that it can renew a token. */
  headers?: HeadersInit | (() => HeadersInit | Promise<HeadersInit>);
  /** As of `fetch`; "same-origin" when not given. */
  credentials?: RequestCredentials;
  fetch?: typeof fetch;
}

export interface Callbacks {
  onFrame?(frame: Frame): void;
  onControl?(control: Control): void;
  /** `error` is why the last connection failed, where it did. */
  onState?(state: State, error?: Error): void;
  /** Reading is over, and this is why. Refusals that will not pass are RelayErrors. */
  onError?(error: Error): void;
  onEnd?(end: End): void;
}

export interface SubscribeOptions extends AddressOptions, Callbacks {
  /** Only one run's frames, until its end: its name, the newest open one, or the newest. */
  run?: "current" | "latest" | (string & {});
  /** Where to begin: behind a cursor, at the earliest frame held ("start", the default) or now ("tail"). */
  after?: "start" | "tail" | (Cursor & {});
  /** For how many seconds at a time relay waits for a stream that does not exist yet, 60 at most. */
  wait?: number;
  /** Frames say which run they are of, and when they were journaled. */
  envelope?: boolean;
  /** Keep the cursor over reloads under this key, in `area` (sessionStorage). */
  store?: { key: string; area?: Pick<Storage, "getItem" | "setItem"> };
  /** false: hold a connection of its own, whatever other tabs do. */
  share?: boolean;
  /** Read by the browser's EventSource, which knows no headers, instead of fetch. */
  eventSource?: boolean;
  /** A connection on which nothing came for so long, no heartbeat either, is dead: 45,000. */
  silenceMs?: number;
  signal?: AbortSignal;
}

/** A stream that is being read. As an iterator it gives frames and control frames, in order. */
export interface Subscription extends AsyncIterable<Message> {
  readonly state: State;
  /** Whether another tab reads for this one, or this one for others. */
  readonly role: "alone" | "leader" | "follower";
  /** The id of the last frame that was handed out, null before there was one. */
  readonly cursor: Cursor | null;
  /** Resolves when reading is over. Never rejects. */
  readonly done: Promise<End>;
  /** Leave. The run goes on. */
  close(): void;
  /** Stop the run that is read, or the stream's newest open one. What was said stays. */
  cancel(reason?: string): Promise<Run>;
  [Symbol.asyncIterator](): AsyncIterableIterator<Message>;
}

/** Read a stream: each frame once and none skipped, over any number of connections. */
export function subscribe(stream: string, options?: SubscribeOptions): Subscription;

export type AskOptions = AddressOptions & Callbacks & Pick<SubscribeOptions, "envelope" | "silenceMs">;

/**
 * Make a request (POST unless `init` says otherwise) whose answer is a stream that relay proxies, and read
 * that answer to its end, over cuts. It gets an `Idempotency-Key`, and is made again when its answer was
 * lost. Rejects with a RelayError where the answer is a refusal or no stream.
 */
export function ask(input: string | URL, init?: RequestInit, options?: AskOptions): Promise<Subscription>;

/** A run as relay describes it. */
export interface Run {
  stream: string;
  /** null where none was open. */
  run: string | null;
  status?: "open" | RunStatus;
  reason?: string | null;
  [member: string]: unknown;
}

/** Stop a run, or the stream's newest open one. */
export function cancel(
  stream: string,
  options?: AddressOptions & { run?: string; reason?: string; signal?: AbortSignal },
): Promise<Run>;

/** A refusal: relay's problem document, or what stood in its place. */
export class RelayError extends Error {
  /** Of the answer; 0 for one that is none, such as a run that failed. */
  readonly status: number;
  /** Stable, as PROTOCOL.md lists them: "unknown_stream", "run_ended", … */
  readonly code: string;
  readonly problem: Record<string, unknown> | null;
  readonly retryAfterMs: number | null;
  /** Whether the same request may be granted later. */
  readonly passing: boolean;
}

/** An incremental parser of `text/event-stream`. */
export class EventStreamParser {
  /** The last `retry:`, null before there was one. */
  readonly retryMs: number | null;
  /** The events that these bytes complete. */
  push(bytes: Uint8Array): { id: string; event: string; data: string }[];
}

export interface RelayChatTransportOptions extends Omit<AddressOptions, "url"> {
  /** The chat route that relay proxies: "/api/chat". */
  api?: string;
  /** What stands before `/relay/v1/…`: the origin of `api`. */
  relay?: string;
  /** More members of the request's body. */
  body?: object | (() => object | Promise<object>);
}

interface ChatRequest {
  chatId: string;
  abortSignal?: AbortSignal | undefined;
  headers?: Record<string, string> | Headers;
  body?: object;
  metadata?: unknown;
}

/**
 * A `ChatTransport` for the AI SDK's `useChat`: answers survive cuts and reloads. A chat's stream has its id
 * for a name, so relay is started with `--stream-from body:/id`.
 */
export class RelayChatTransport<MESSAGE = any> {
  readonly resumeStreamIsReplay: boolean;
  constructor(options?: RelayChatTransportOptions);
  sendMessages(
    options: ChatRequest & {
      trigger: "submit-message" | "regenerate-message";
      messageId: string | undefined;
      messages: MESSAGE[];
    },
  ): Promise<ReadableStream<any>>;
  reconnectToStream(options: ChatRequest): Promise<ReadableStream<any> | null>;
  /** Stop the answer that is being given. `stop()` of `useChat` only leaves it. */
  cancel(chatId: string, options?: { headers?: HeadersInit }): Promise<Run>;
}
