// The package `@anthropic-ai/sdk`.
import Anthropic from "@anthropic-ai/sdk";

import { note } from "./notes.mjs";

await note(async ({ url, key }, say) => {
  const client = new Anthropic({ baseURL: url, apiKey: "k" });
  const asked = { model: "m", max_tokens: 9, messages: [{ role: "user", content: "hello" }] };
  const stream = client.messages.stream(asked, { headers: { "Idempotency-Key": key } });
  stream.on("text", say);
  const message = await stream.finalMessage();
  if (message.stop_reason !== "tool_use") throw new Error(`stopped for ${message.stop_reason}`);
});
