// A subscription against a scripted relay: what it hands out, what it asks, and when it stops asking.

import assert from "node:assert/strict";
import test from "node:test";

import { cancel, RelayError, subscribe } from "../../relay/static/relay-stream.js";
import {
  bye,
  control,
  frame,
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

const URL_OF_RELAY = "http://relay.test";
const open = (relay, options = {}) =>
  subscribe("chat-1", { url: URL_OF_RELAY, fetch: relay.fetch, ...options });
const cursors = (relay) => relay.requests.map(({ cursor }) => cursor);

test("a stream that is cut anywhere is handed out once, and asked for from its cursor", async () => {
  const whole = new TextEncoder().encode(
    [hello(0), frame(1), frame(2, "wörd → 🙂\ndata: of two lines"), frame(3), bye(3, "ended")].join(""),
  );
  for (let cut = 0; cut < whole.length; cut += 1) {
    const relay = new ScriptedRelay();
    // What comes again is what a relay would not send: the client drops it by its ids.
    relay.then(stream([whole.subarray(0, cut)], { end: "cut" }), stream([whole]));
    const subscription = open(relay);
    const messages = await listen(subscription);
    assert.deepEqual(seqs(messages), [1, 2, 3]);
    assert.equal(messages.filter(({ data }) => data === "wörd → 🙂\nof two lines").length, 1);
    assert.equal((await subscription.done).reason, "ended");
    assert.equal(relay.requests.length, 2);
    assert.deepEqual(cursors(relay), [null, lastWholeId(whole.subarray(0, cut))], `cut at ${cut}`);
  }
});

/** The id of the last event that is whole in these bytes; null when none is. */
function lastWholeId(bytes) {
  const blocks = new TextDecoder().decode(bytes).split("\n\n").slice(0, -1);
  return blocks.map((block) => /^id: (\S+)/m.exec(block)?.[1] ?? null).at(-1) ?? null;
}

test("a frame that comes twice is handed out once", async () => {
  const relay = new ScriptedRelay().then(
    stream([hello(0), frame(1), frame(1), frame(2), frame(1), bye(2, "ended")]),
  );
  assert.deepEqual(seqs(await listen(open(relay))), [1, 2]);
});

test("a hole is not stepped over: the stream is asked for again from before it", async () => {
  const relay = new ScriptedRelay();
  relay.then(stream([hello(0), frame(1) + frame(3)], { end: "open" }));
  relay.then(stream([hello(1), frame(2), frame(3), bye(3, "ended")]));
  assert.deepEqual(seqs(await listen(open(relay))), [1, 2, 3]);
  assert.deepEqual(cursors(relay), [null, id(1)]);
});

test("a hole that stays is an error in the end, and never stepped over", async () => {
  const relay = new ScriptedRelay();
  const holed = stream([hello(0), frame(2)]);
  relay.then(holed, holed, holed, holed);
  const subscription = open(relay);
  await assert.rejects(listen(subscription), /missing between 0 and 2/);
  assert.equal((await subscription.done).reason, "error");
  assert.equal(relay.requests.length, 3);
});

test("frames of other runs are no holes for who reads one run, and its ending ends the reading", async () => {
  const relay = new ScriptedRelay();
  const ended = { run: "r", status: "completed", reason: "producer_end", frames: 2, text_bytes: 2 };
  relay.then(stream([hello(3), control(4, "run.started", { run: "r" }), frame(6), frame(9)], { end: "cut" }));
  relay.then(stream([hello(9), control(11, "run.ended", ended)], { end: "open" }));
  const messages = await listen(open(relay, { run: "latest" }));
  assert.deepEqual(types(messages), ["hello", "run.started", "frame", "frame", "hello", "run.ended"]);
  assert.deepEqual(messages.at(-1), { type: "run.ended", id: id(11), ...ended });
  // Once it is known which run that is, no later one is taken for it.
  assert.deepEqual(
    relay.requests.map(({ url }) => url.searchParams.get("run")),
    ["latest", "r"],
  );
});

test("a gap and a reset are told once, and move the cursor", async () => {
  const relay = new ScriptedRelay();
  relay.then(
    stream([hello(2), control(5, "gap", { requested: id(2), earliest: id(6) }), frame(6)], { end: "cut" }),
  );
  relay.then(
    stream([hello(6), control(0, "reset", { reason: "recreated" }), frame(1), frame(2)], { end: "cut" }),
  );
  relay.then(stream([hello(2), bye(2, "ended")]));
  const messages = await listen(open(relay, { after: id(2) }));
  assert.deepEqual(
    types(messages).filter((type) => type !== "hello" && type !== "bye"),
    ["gap", "frame", "reset", "frame", "frame"],
  );
  assert.deepEqual(cursors(relay), [id(2), id(6), id(2)]);
});

test("a hello with another position than the cursor moves nothing", async () => {
  const relay = new ScriptedRelay();
  relay.then(stream([hello(0), frame(1), frame(2)], { end: "cut" }));
  relay.then(stream([hello(7), frame(8)], { end: "cut" }), stream([hello(2), frame(3), bye(3, "ended")]));
  assert.deepEqual(seqs(await listen(open(relay))), [1, 2, 3]);
  assert.deepEqual(cursors(relay), [null, id(2), id(2)]);
});

for (const reason of ["drain", "rotate", "slow", "busy"]) {
  test(`after bye ${reason} it comes back`, async () => {
    const relay = new ScriptedRelay();
    relay.then(
      stream([hello(0), frame(1), bye(1, reason)], { end: "open" }),
      stream([hello(1), bye(1, "ended")]),
    );
    assert.deepEqual(seqs(await listen(open(relay))), [1]);
    assert.deepEqual(cursors(relay), [null, id(1)]);
  });
}

for (const [name, answer, reason] of [
  ["204", noContent, "ended"],
  ["bye ended", stream([hello(0), bye(0, "ended")], { end: "open" }), "ended"],
  ["bye deleted", stream([hello(0), bye(0, "deleted")], { end: "open" }), "deleted"],
]) {
  test(`${name} is the end: nothing is asked any more`, async () => {
    const relay = new ScriptedRelay().then(answer);
    const states = [];
    const ends = [];
    const subscription = open(relay, {
      onState: (state) => states.push(state),
      onEnd: (end) => ends.push(end),
    });
    assert.deepEqual(await subscription.done, { reason });
    assert.deepEqual(ends, [{ reason }]);
    assert.equal(states.at(-1), "closed");
    assert.equal(relay.requests.length, 1);
  });
}

for (const status of [400, 401, 403, 404, 406, 410]) {
  test(`${status} is an error that is not asked for again`, async () => {
    const relay = new ScriptedRelay().then(problem(status, "some_code"));
    const errors = [];
    const subscription = open(relay, { onError: (error) => errors.push(error) });
    const { reason, error } = await subscription.done;
    assert.equal(reason, "error");
    assert.ok(error instanceof RelayError);
    assert.deepEqual(
      [error.status, error.code, error.message],
      [status, "some_code", "because of some_code"],
    );
    assert.equal(error.problem.title, "Refused");
    assert.deepEqual(errors, [error]);
    await assert.rejects(listen(subscription), error);
    assert.equal(relay.requests.length, 1);
  });
}

for (const status of [408, 425, 429, 500, 502, 503, 504]) {
  test(`${status} passes: it is asked for again when it says`, async () => {
    const relay = new ScriptedRelay();
    relay.then(stream(["retry: 1\n\n"]), problem(status, "busy", { "Retry-After": "0" }), noContent);
    const failures = [];
    const subscription = open(relay, { onState: (state, error) => error && failures.push(error.status) });
    assert.equal((await subscription.done).reason, "ended");
    assert.deepEqual(failures, [status]);
    assert.equal(relay.requests.length, 3);
  });
}

test("an answer that is no event stream is an error when it comes again and again", async () => {
  const page = async () => new Response("<html>", { headers: { "Content-Type": "text/html" } });
  const relay = new ScriptedRelay().then(stream(["retry: 1\n\n"]), page, page, page, noContent);
  assert.equal((await open(relay).done).error.code, "not_a_stream");
  assert.equal(relay.requests.length, 4);
});

test("a head that was cut, and so has no content type, is asked for again", async () => {
  const relay = new ScriptedRelay().then(stream(["retry: 1\n\n"]), async () => new Response(""), noContent);
  assert.equal((await open(relay).done).reason, "ended");
});

test("a relay that cannot be reached is asked again, at random within a growing time", async (t) => {
  const pauses = [];
  const random = t.mock.method(Math, "random", () => 1 / 1024);
  const timeout = globalThis.setTimeout;
  t.mock.method(globalThis, "setTimeout", (callback, ms, ...rest) => {
    pauses.push(ms);
    return timeout(callback, 0, ...rest);
  });
  const relay = new ScriptedRelay().then(stream(["retry: 1024\n\n"]), ...Array(8).fill(lost), noContent);
  await open(relay).done;
  assert.ok(random.mock.callCount() > 0);
  const longest = 30_000 / 1024;
  assert.deepEqual(pauses, [1, 2, 4, 8, 16, longest, longest, longest, longest]);
});

test("bye says how long to wait, and is believed", async (t) => {
  const pauses = [];
  const timeout = globalThis.setTimeout;
  t.mock.method(globalThis, "setTimeout", (callback, ms) => {
    pauses.push(ms);
    return timeout(callback, 0);
  });
  const relay = new ScriptedRelay();
  relay.then(stream([hello(0), control(0, "bye", { reason: "drain", retry_ms: 777 })]), noContent);
  await open(relay).done;
  assert.deepEqual(pauses, [777]);
});

test("a connection on which nothing comes is given up; heartbeats keep one", async () => {
  const relay = new ScriptedRelay();
  relay.then(stream([hello(0), frame(1)], { end: "open" }), stream([hello(1), frame(2), bye(2, "ended")]));
  assert.deepEqual(seqs(await listen(open(relay, { silenceMs: 20 }))), [1, 2]);
  assert.equal(relay.requests.length, 2);
});

test("headers are asked for each time, and the tail is asked for only before there is a cursor", async () => {
  const relay = new ScriptedRelay();
  relay.then(stream([hello(4), frame(5)], { end: "cut" }), noContent);
  let token = 0;
  await open(relay, { after: "tail", headers: async () => ({ Authorization: `Bearer ${++token}` }) }).done;
  assert.deepEqual(
    relay.requests.map(({ headers }) => headers.get("Authorization")),
    ["Bearer 1", "Bearer 2"],
  );
  assert.deepEqual(
    relay.requests.map(({ url }) => url.searchParams.get("after")),
    ["tail", null],
  );
  assert.deepEqual(cursors(relay), [null, id(5)]);
});

test("a stored cursor is where the next one goes on, and storage that fails is done without", async () => {
  const kept = new Map();
  const area = { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) };
  const relay = new ScriptedRelay();
  relay.then(
    stream([hello(0), frame(1), frame(2)], { end: "open" }),
    stream([hello(2), frame(3), bye(3, "ended")]),
  );
  const first = open(relay, {
    store: { key: "c", area },
    onFrame: ({ id: got }) => got === id(2) && first.close(),
  });
  assert.equal((await first.done).reason, "closed");
  assert.equal(kept.get("c"), id(2));
  assert.deepEqual(seqs(await listen(open(relay, { store: { key: "c", area } }))), [3]);
  assert.deepEqual(cursors(relay), [null, id(2)]);
  assert.equal(kept.get("c"), id(3));
  const forbidden = () => {
    throw new Error("forbidden");
  };
  relay.then(stream([hello(0), frame(1), bye(1, "ended")]));
  const without = open(relay, { store: { key: "c", area: { getItem: forbidden, setItem: forbidden } } });
  assert.deepEqual(seqs(await listen(without)), [1]);
});

test("what an iterator has not taken is not stored as read", async () => {
  const kept = new Map();
  const area = { getItem: () => null, setItem: (key, value) => kept.set(key, value) };
  const relay = new ScriptedRelay().then(stream([hello(0), frame(1), frame(2), frame(3)], { end: "open" }));
  let came;
  const all = new Promise((resolve) => (came = resolve));
  const onFrame = ({ id: got }) => got === id(3) && came();
  const messages = open(relay, { store: { key: "c", area }, onFrame })[Symbol.asyncIterator]();
  await messages.next();
  await all;
  assert.equal(kept.get("c"), id(0));
  await messages.next();
  await messages.next();
  assert.equal(kept.get("c"), id(2));
  await messages.return();
  assert.equal(kept.get("c"), id(2));
});

test("a subscription that is closed in the midst of a chunk hands out no more of it", async () => {
  const relay = new ScriptedRelay().then(
    stream([hello(0) + frame(1) + frame(2) + frame(3)], { end: "open" }),
  );
  const got = [];
  const subscription = open(relay, {
    onFrame({ id: seq }) {
      got.push(seq);
      if (seq === id(2)) subscription.close();
    },
  });
  assert.deepEqual(await subscription.done, { reason: "closed" });
  assert.deepEqual(got, [id(1), id(2)]);
  assert.equal(subscription.cursor, id(2));
});

test("an abort signal closes, before or after the first frame", async () => {
  const relay = new ScriptedRelay().then(stream([hello(0), frame(1)], { end: "open" }));
  assert.equal((await open(relay, { signal: AbortSignal.abort() }).done).reason, "closed");
  assert.equal(relay.requests.length, 0);
  const leaving = new AbortController();
  const subscription = open(relay, { signal: leaving.signal, onFrame: () => leaving.abort() });
  assert.equal((await subscription.done).reason, "closed");
  assert.equal(relay.requests.length, 1);
});

test("a slow iterator makes the connection go, not the frames, and not the memory", async () => {
  const total = 5000;
  const chunk = 500;
  const relay = new ScriptedRelay();
  const answer = async (signal) => {
    const from = Number((relay.requests.at(-1).cursor ?? "0-0").split("-")[0]);
    const parts = [hello(from)];
    for (let seq = from + 1; seq <= total; seq += chunk) {
      const last = Math.min(total, seq + chunk - 1);
      parts.push(Array.from({ length: last - seq + 1 }, (_, n) => frame(seq + n)).join(""));
    }
    return stream([...parts, bye(total, "ended")])(signal);
  };
  relay.then(...Array(20).fill(answer));
  const states = [];
  const subscription = open(relay, { onState: (state) => states.push(state) });
  const messages = subscription[Symbol.asyncIterator]();
  const got = [];
  for (let taken = await messages.next(); !taken.done; taken = await messages.next()) {
    if (taken.value.type === "frame") got.push(Number(taken.value.id.split("-")[0]));
    if (got.length === 1)
      while (subscription.state !== "suspended") await new Promise((resolve) => setImmediate(resolve));
  }
  assert.deepEqual(
    got,
    Array.from({ length: total }, (_, n) => n + 1),
  );
  assert.ok(relay.requests.length > 1);
});

test("a callback that throws takes nothing from the others", async (t) => {
  const thrown = [];
  t.mock.method(globalThis, "setTimeout", (callback) => {
    try {
      callback();
    } catch (error) {
      thrown.push(error.message);
    }
  });
  const relay = new ScriptedRelay().then(stream([hello(0), frame(1), frame(2), bye(2, "ended")]));
  const got = [];
  const subscription = open(relay, {
    onFrame({ id: seq }) {
      got.push(seq);
      throw new Error(`mistake at ${seq}`);
    },
  });
  await subscription.done;
  assert.deepEqual(got, [id(1), id(2)]);
  assert.deepEqual(thrown, [`mistake at ${id(1)}`, `mistake at ${id(2)}`]);
});

test("the envelope tells run and time of each frame, and changes nothing else", async () => {
  const object = { id: id(1), event: "note", data: "a\r\nb", run: "r", at: "2026-01-01T00:00:00.000Z" };
  const live = { id: id(1), event: "relay", data: '{"type":"live"}', run: null, at: null };
  const enveloped = (value) => `id: ${value.id}\ndata: ${JSON.stringify(value)}\n\n`;
  const relay = new ScriptedRelay().then(
    stream([enveloped(object) + enveloped(live)], { end: "cut" }),
    noContent,
  );
  const messages = await listen(open(relay, { envelope: true }));
  assert.deepEqual(messages, [
    { type: "frame", ...object, data: "a\nb" },
    { type: "live", id: id(1) },
  ]);
  assert.equal(relay.requests[0].url.searchParams.get("envelope"), "json");
});

test("cancel stops the run that is read, or the newest, and a refusal is an error", async () => {
  const ended = async () => Response.json({ stream: "chat-1", run: "r", status: "cancelled" });
  const relay = new ScriptedRelay().then(ended, ended, problem(404, "unknown_run"));
  const options = { url: `${URL_OF_RELAY}/`, fetch: relay.fetch };
  assert.equal((await cancel("chat-1", { ...options, run: "r", reason: "enough" })).status, "cancelled");
  await cancel("chat-1", options);
  await assert.rejects(cancel("chat-1", options), { code: "unknown_run", status: 404 });
  assert.deepEqual(
    relay.requests.map(({ method, url, body }) => [method, url.pathname, body]),
    [
      ["POST", "/relay/v1/streams/chat-1/runs/r/cancel", '{"reason":"enough"}'],
      ["POST", "/relay/v1/streams/chat-1/cancel", null],
      ["POST", "/relay/v1/streams/chat-1/cancel", null],
    ],
  );
});
