// A relay whose every answer the test decides, in the place of `fetch`, and that remembers how it was asked.

export class ScriptedRelay {
  requests = [];
  #answers = [];
  #asked = [];

  /** The next request gets this answer; without one that is left, a request is refused for good. */
  then(...answers) {
    this.#answers.push(...answers);
    return this;
  }

  fetch = async (input, init = {}) => {
    const request = new Request(input, { ...init, signal: undefined });
    const { signal } = init;
    const body = request.body ? await request.text() : null;
    this.requests.push({
      method: request.method,
      url: new URL(request.url),
      cursor: request.headers.get("Last-Event-ID"),
      headers: request.headers,
      body,
    });
    for (const asked of this.#asked.splice(0)) asked();
    const answer = this.#answers.shift() ?? problem(418, "not_scripted");
    return answer(signal);
  };

  /** Resolves when so many requests were made. */
  async asked(count) {
    while (this.requests.length < count) await new Promise((resolve) => this.#asked.push(resolve));
  }
}

/** An event stream of these parts. It is whole then, or `cut`, or stays open (`open`) until it is left.
 * A part that is a promise is waited for. */
export function stream(parts, { end = "whole", headers = {} } = {}) {
  return async (signal) => {
    let index = 0;
    const body = new ReadableStream({
      async pull(controller) {
        if (index < parts.length) {
          const part = await parts[index++];
          if (part !== undefined)
            controller.enqueue(typeof part === "string" ? new TextEncoder().encode(part) : part);
          else controller.enqueue(new Uint8Array());
        } else if (end === "whole") controller.close();
        else if (end === "cut") controller.error(new TypeError("terminated"));
        else await new Promise((resolve) => signal?.addEventListener("abort", resolve));
      },
    });
    return new Response(body, {
      headers: { "Content-Type": "text/event-stream; charset=utf-8", ...headers },
    });
  };
}

export const noContent = async () => new Response(null, { status: 204 });

export const lost = async () => {
  throw new TypeError("fetch failed");
};

export function problem(status, code, headers = {}) {
  const body = JSON.stringify({ title: "Refused", status, code, detail: `because of ${code}` });
  return async () =>
    new Response(body, { status, headers: { "Content-Type": "application/problem+json", ...headers } });
}

/** A journaled event with a seq; its `ms` is made of it. */
export function frame(seq, data = `word ${seq}`, event = "") {
  return `id: ${id(seq)}\n${event && `event: ${event}\n`}data: ${data}\n\n`;
}

export const id = (seq) => (seq === 0 ? "0-0" : `${seq}-${1000 + seq}`);

/** A control frame with the position that it establishes, or that is its own. */
export function control(seq, type, members = {}) {
  return frame(seq, JSON.stringify({ type, ...members }), "relay");
}

export const hello = (seq) => `retry: 1\n\n${control(seq, "hello", { cursor: id(seq), resumed: seq > 0 })}`;
export const bye = (seq, reason) => control(seq, "bye", { reason, retry_ms: 1 });

/** Everything that a subscription says until it is over. */
export async function listen(subscription) {
  const messages = [];
  for await (const message of subscription) messages.push(message);
  return messages;
}

export const seqs = (messages) =>
  messages.filter((message) => message.type === "frame").map((message) => Number(message.id.split("-")[0]));
export const types = (messages) => messages.map((message) => message.type);
