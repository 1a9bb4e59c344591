// Every case is read whole, byte by byte, and cut at every place.

import assert from "node:assert/strict";
import test from "node:test";

import { EventStreamParser } from "../../relay/static/relay-stream.js";

const CASES = [
  ["an event ends at its blank line", "data: a\n\ndata: not yet\n", [["", "", "a"]]],
  ["lines end with LF, CR or CRLF", "data: a\r\rdata: b\r\n\r\ndata: c\n\r\ndata: d\r\n\n", "abcd"],
  ["a CRLF that is cut is one line end", "data: a\r\ndata: b\r\n\r\n", [["", "", "a\nb"]]],
  ["several data lines are joined with LF", "data: a\ndata:\ndata: b\n\n", [["", "", "a\n\nb"]]],
  [
    "one space behind the colon is no part of the value",
    "data:a\n\ndata:  b\n\n",
    [
      ["", "", "a"],
      ["", "", " b"],
    ],
  ],
  ["a line without a colon is a field without a value", "data\n\n", [["", "", ""]]],
  ["comments and unknown fields say nothing", ": hb\nfoo: bar\ndata: a\n: relay {}\n\n", "a"],
  [
    "a name is of one event only",
    "event: x\ndata: a\n\ndata: b\n\n",
    [
      ["", "x", "a"],
      ["", "", "b"],
    ],
  ],
  [
    "an id stays until the next",
    "id: 1-1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n",
    [
      ["1-1", "", "a"],
      ["1-1", "", "b"],
      ["", "", "c"],
    ],
  ],
  ["an id with NUL is none", "id: 1\0\ndata: a\n\n", "a"],
  [
    "a block without data is no event, but its id counts",
    "id: 5-5\nevent: x\n\ndata: a\n\n",
    [["5-5", "", "a"]],
  ],
  [
    "a byte order mark at the start is skipped, and no other",
    "\ufeffdata: \ufeffa\n\n",
    [["", "", "\ufeffa"]],
  ],
  ["text has any characters", "data: wörd → 🙂\n\n", [["", "", "wörd → 🙂"]]],
];

const read = (pieces) => {
  const parser = new EventStreamParser();
  return pieces.flatMap((piece) => parser.push(piece)).map(({ id, event, data }) => [id, event, data]);
};

for (const [name, text, expected] of CASES) {
  test(name, () => {
    const bytes = new TextEncoder().encode(text);
    const events = typeof expected === "string" ? [...expected].map((data) => ["", "", data]) : expected;
    assert.deepEqual(read([bytes]), events);
    assert.deepEqual(read([...bytes].map((byte) => Uint8Array.of(byte))), events);
    for (let cut = 0; cut <= bytes.length; cut += 1) {
      assert.deepEqual(read([bytes.subarray(0, cut), bytes.subarray(cut)]), events);
    }
  });
}

test("an event whose blank line ends with CR is there before it is known what follows", () => {
  const parser = new EventStreamParser();
  assert.equal(parser.push(new TextEncoder().encode("data: a\r\r")).length, 1);
  assert.equal(parser.push(new TextEncoder().encode("\ndata: b\n\n")).length, 1);
});

test("a retry of digits is taken, and nothing else", () => {
  const parser = new EventStreamParser();
  for (const [value, retryMs] of [
    ["x", null],
    ["250", 250],
    ["-1", 250],
    ["", 250],
    ["1.5", 250],
    ["0", 0],
  ]) {
    parser.push(new TextEncoder().encode(`retry: ${value}\n`));
    assert.equal(parser.retryMs, retryMs);
  }
});

test("bytes that are no UTF-8 are read as replacement characters", () => {
  assert.deepEqual(read([Uint8Array.of(...new TextEncoder().encode("data: a"), 0xf0, 0x9f, 10, 10)]), [
    ["", "", "a\ufffd"],
  ]);
});
