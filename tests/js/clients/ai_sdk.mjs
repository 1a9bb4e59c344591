// The package `ai`: what is under `useChat`, without a page.
import { DefaultChatTransport, readUIMessageStream } from "ai-6"; // the newest that Node 20 may run

import { note } from "./notes.mjs";

await note(async ({ url, key, chat, reconnect }, say, show) => {
  const transport = new DefaultChatTransport({ api: `${url}/api/chat`, headers: { "Idempotency-Key": key } });
  const stream = reconnect
    ? await transport.reconnectToStream({ chatId: chat })
    : await transport.sendMessages({ chatId: chat, messages: [], trigger: "submit-message" });
  let last;
  const looked = stream.pipeThrough(
    new TransformStream({
      transform(chunk, controller) {
        last = chunk.type;
        controller.enqueue(chunk);
      },
    }),
  );
  for await (const message of readUIMessageStream({ stream: looked, terminateOnError: true })) {
    show(message.parts.map((part) => (part.type === "text" ? part.text : "")).join(""));
  }
  if (last !== "finish") throw new Error(`ended with ${last}`);
});
