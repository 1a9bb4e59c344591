// Asking through relay's proxy, and the chat transport on top of it, against a scripted relay.

import assert from "node:assert/strict";
import test from "node:test";

import { ask, RelayChatTransport, RelayError } from "../../relay/static/relay-stream.js";
import {
  control,
  hello,
  id,
  listen,
  lost,
  noContent,
  problem,
  ScriptedRelay,
  seqs,
  stream,
  types,
} from "./scripted_relay.mjs";

// Pauses before another try are as short as can be, but where a test is about them.
Math.random = () => 0;

const API = "http://relay.test/api/chat";
const HEADERS = { "Relay-Stream": "chat-1", "Relay-Run": "r", "Relay-Cursor": id(4) };

/** An event of a proxied answer: its id holds the run's secret before the cursor. */
const proxied = (seq, data) => `id: rly.s3cret.${id(seq)}\ndata: ${data}\n\n`;
const answer = (parts, end) => stream(parts, { end, headers: HEADERS });
const ended = (seq, status, more = {}) =>
  control(seq, "run.ended", { run: "r", status, reason: "some_reason", frames: 1, text_bytes: 1, ...more });

test("an answer that is cut goes on behind its last frame, on the events route, to its ending", async () => {
  const relay = new ScriptedRelay();
  relay.then(answer([proxied(6, "a"), proxied(7, "b"), "id: rly.s3cret.8-1008\nda"], "cut"));
  relay.then(stream([hello(7), `id: ${id(8)}\ndata: c\n\n`, ended(9, "completed")], { end: "open" }));
  const messages = await listen(await ask(API, { body: "{}" }, { fetch: relay.fetch }));
  assert.deepEqual(seqs(messages), [6, 7, 8]);
  assert.equal(messages.at(-1).status, "completed");
  const [first, second] = relay.requests;
  assert.deepEqual([first.method, first.body], ["POST", "{}"]);
  assert.ok(first.headers.get("Idempotency-Key").length > 20);
  assert.equal(second.url.href, "http://relay.test/relay/v1/streams/chat-1/events?run=r");
  assert.deepEqual([second.method, second.cursor], ["GET", id(7)]);
  assert.equal(relay.requests.length, 2);
});

test("an answer that was cut before its first frame is read from where its head said", async () => {
  const relay = new ScriptedRelay().then(answer([], "cut"), noContent);
  await (
    await ask(API, {}, { fetch: relay.fetch })
  ).done;
  assert.equal(relay.requests[1].cursor, id(4));
});

test("a request whose answer was lost is made again under the same key", async () => {
  const relay = new ScriptedRelay().then(
    lost,
    problem(503, "busy", { "Retry-After": "0" }),
    answer([], "whole"),
    noContent,
  );
  await (
    await ask(API, { body: "text" }, { fetch: relay.fetch })
  ).done;
  const keys = relay.requests.slice(0, 3).map(({ headers }) => headers.get("Idempotency-Key"));
  assert.equal(new Set(keys).size, 1);
  assert.deepEqual(
    relay.requests.slice(0, 3).map(({ body }) => body),
    ["text", "text", "text"],
  );
});

test("the agent's refusal is an error, and is not asked for again", async () => {
  const relay = new ScriptedRelay().then(async () => new Response("no such model", { status: 500 }));
  await assert.rejects(ask(API, {}, { fetch: relay.fetch }), {
    name: "RelayError",
    status: 500,
    message: "no such model",
  });
  assert.equal(relay.requests.length, 1);
});

test("an answer in lines is read as events", async () => {
  const lines = async () =>
    new Response("{}\n", { headers: { "Content-Type": "application/x-ndjson", ...HEADERS } });
  const relay = new ScriptedRelay().then(
    lines,
    stream([hello(4), `id: ${id(6)}\ndata: {}\n\n`, ended(7, "completed")]),
  );
  assert.deepEqual(seqs(await listen(await ask(API, {}, { fetch: relay.fetch }))), [6]);
});

test("a stream that is not journaled is read as far as it comes; anything else is no stream", async () => {
  const relay = new ScriptedRelay();
  relay.then(stream(["data: a\n\ndata: b\n\n"]), stream(["data: a\n\n"], { end: "cut" }), async () =>
    Response.json({}),
  );
  const whole = await ask(API, {}, { fetch: relay.fetch });
  assert.deepEqual(
    (await listen(whole)).map(({ data }) => data),
    ["a", "b"],
  );
  assert.equal((await (await ask(API, {}, { fetch: relay.fetch })).done).reason, "error");
  await assert.rejects(ask(API, {}, { fetch: relay.fetch }), { code: "not_a_stream" });
  assert.equal(relay.requests.length, 3);
});

// --- the chat transport ------------------------------------------------------------------------------------

const transport = (relay) =>
  new RelayChatTransport({ api: API, fetch: relay.fetch, headers: { Authorization: "Bearer t" } });
const send = (relay, more = {}) =>
  transport(relay).sendMessages({
    trigger: "submit-message",
    chatId: "chat-1",
    messageId: undefined,
    messages: [{ id: "m", role: "user", parts: [] }],
    abortSignal: undefined,
    ...more,
  });
const chunk = (text) => JSON.stringify({ type: "text-delta", id: "t", delta: text });
const deltas = (chunks) => chunks.map(({ delta }) => delta);
const all = async (readable) => {
  const chunks = [];
  for await (const each of readable) chunks.push(each);
  return chunks;
};

test("a chat's answer that is cut arrives whole, and nothing is asked after its [DONE]", async () => {
  const relay = new ScriptedRelay();
  relay.then(answer([proxied(6, chunk("a")), proxied(7, chunk("b"))], "cut"));
  relay.then(
    stream([hello(7), `id: ${id(8)}\ndata: ${chunk("c")}\n\nid: ${id(9)}\ndata: [DONE]\n\n`], {
      end: "open",
    }),
  );
  assert.deepEqual(deltas(await all(await send(relay, { body: { model: "x" } }))), ["a", "b", "c"]);
  assert.equal(relay.requests.length, 2);
  const [{ headers, body }, again] = relay.requests;
  assert.deepEqual(JSON.parse(body), {
    model: "x",
    id: "chat-1",
    messages: [{ id: "m", role: "user", parts: [] }],
    trigger: "submit-message",
  });
  assert.equal(headers.get("Relay-Stream"), "chat-1");
  assert.equal(headers.get("Relay-Supersedes"), null);
  for (const request of [headers, again.headers]) assert.equal(request.get("Authorization"), "Bearer t");
});

test("to regenerate is to supersede", async () => {
  const relay = new ScriptedRelay().then(answer([proxied(6, "[DONE]")]));
  assert.deepEqual(await all(await send(relay, { trigger: "regenerate-message", messageId: "m" })), []);
  assert.equal(relay.requests[0].headers.get("Relay-Supersedes"), "latest");
});

for (const [status, outcome] of [
  ["completed", "whole"],
  ["cancelled", "aborted"],
  ["failed", "broken"],
  ["lost", "broken"],
]) {
  test(`an answer without [DONE] whose run ${status} is ${outcome}`, async () => {
    const relay = new ScriptedRelay().then(answer([proxied(6, chunk("a"))]));
    relay.then(
      stream([hello(6), ended(7, status, { error: status === "failed" ? "out of words" : undefined })]),
    );
    const reading = send(relay).then(all);
    if (outcome === "broken") {
      await assert.rejects(reading, {
        name: "RelayError",
        code: "some_reason",
        message: status === "failed" ? "out of words" : "some_reason",
      });
    } else {
      const chunks = await reading;
      assert.deepEqual(
        chunks.map(({ type }) => type),
        outcome === "whole" ? ["text-delta"] : ["text-delta", "abort"],
      );
    }
  });
}

test("a reloaded chat gets the answer that is being given from its start, or null", async () => {
  const relay = new ScriptedRelay();
  relay.then(
    stream([hello(4), control(5, "run.started", { run: "r" }), `id: ${id(6)}\ndata: ${chunk("a")}\n\n`], {
      end: "cut",
    }),
  );
  relay.then(stream([hello(6), `id: ${id(7)}\ndata: [DONE]\n\n`], { end: "open" }));
  const chat = transport(relay);
  assert.equal(chat.resumeStreamIsReplay, true);
  assert.deepEqual(deltas(await all(await chat.reconnectToStream({ chatId: "chat-1" }))), ["a"]);
  assert.deepEqual(
    relay.requests.map(({ url }) => url.searchParams.get("run")),
    ["current", "r"],
  );
  relay.then(noContent, problem(404, "unknown_stream"), problem(401, "unauthorized"));
  assert.equal(await chat.reconnectToStream({ chatId: "chat-1" }), null);
  assert.equal(await chat.reconnectToStream({ chatId: "chat-1" }), null);
  await assert.rejects(chat.reconnectToStream({ chatId: "chat-1" }), { status: 401 });
});

test("an answer of which a part is no longer kept is an error, not a part taken for the whole", async () => {
  const relay = new ScriptedRelay();
  relay.then(
    stream([
      control(4, "hello"),
      control(9, "gap", { requested: id(4) }),
      `id: ${id(10)}\ndata: ${chunk("z")}\n\n`,
    ]),
  );
  const readable = await transport(relay).reconnectToStream({ chatId: "chat-1" });
  await assert.rejects(all(readable), { code: "gap" });
});

test("aborting leaves with an AbortError and cancels nothing; cancel stops", async () => {
  const relay = new ScriptedRelay().then(answer([proxied(6, chunk("a"))], "open"), async () =>
    Response.json({ run: "r" }),
  );
  const leaving = new AbortController();
  const reader = (await send(relay, { abortSignal: leaving.signal })).getReader();
  assert.equal((await reader.read()).value.delta, "a");
  const next = reader.read();
  leaving.abort();
  await assert.rejects(next, { name: "AbortError" });
  assert.equal(relay.requests.length, 1);
  assert.deepEqual(await transport(relay).cancel("chat-1"), { run: "r" });
  assert.equal(relay.requests[1].url.pathname, "/relay/v1/streams/chat-1/cancel");
});

test("types of messages are those of the wire", async () => {
  const relay = new ScriptedRelay().then(
    answer([proxied(6, "a")]),
    stream([hello(6), ended(7, "completed")]),
  );
  assert.deepEqual(types(await listen(await ask(API, {}, { fetch: relay.fetch }))), [
    "frame",
    "hello",
    "run.ended",
  ]);
  assert.ok(new RelayError("x") instanceof Error);
});
