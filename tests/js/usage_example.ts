// How relay-stream is used from TypeScript. It is compiled, not run.

import type { ChatTransport, UIMessage } from "ai";
import { ask, cancel, RelayChatTransport, RelayError, subscribe } from "relay-stream";
import type { Control, End, Frame, Subscription } from "relay-stream";

// With callbacks.
const chat: Subscription = subscribe("chat-1", {
  headers: async () => ({ Authorization: `Bearer ${await token()}` }),
  store: { key: "chat-1 cursor", area: localStorage },
  onFrame: (frame: Frame) => document.body.append(frame.event, frame.data),
  onControl(control: Control) {
    if (control.type === "reset") document.body.replaceChildren();
    if (control.type === "run.ended" && control.status !== "completed")
      console.warn(control.error ?? control.reason);
    if (control.type === "run.superseded") console.log(`${control.run} was answered anew as ${control.by}`);
  },
  onState: (state) => console.log(state === "waiting" ? "reconnecting" : state),
  onError(error) {
    if (error instanceof RelayError && error.code === "unknown_stream") console.log("no such chat");
  },
});
const ended: Promise<End> = chat.done;
await chat.cancel("enough");
chat.close();

// As an iterator, of one run only.
for await (const message of subscribe("chat-1", {
  run: "current",
  wait: 5,
  signal: AbortSignal.timeout(1000),
})) {
  if (message.type === "frame") console.log(message.data.length, message.run);
  else if (message.type === "bye") console.log(message.reason, message.retry_ms);
  // @ts-expect-error A control frame has no data.
  else console.log(message.data);
}

// A request through the proxy.
const answer = await ask(
  "/v1/chat/completions",
  { body: JSON.stringify({ stream: true }) },
  { envelope: true },
);
for await (const message of answer) console.log(message.id);
await cancel("chat-1", { run: "r", url: "https://relay.example" });

// The AI SDK.
const transport = new RelayChatTransport<UIMessage>({ api: "/api/chat", headers: { "X-Chat": "1" } });
const forUseChat: ChatTransport<UIMessage> = transport;
await transport.cancel("chat-1");

// @ts-expect-error A stream has a name.
subscribe(1);
// @ts-expect-error Cursors are text.
subscribe("chat-1", { after: 12 });

declare function token(): Promise<string>;
export { ended, forUseChat };
