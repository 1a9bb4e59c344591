// The package `openai`, its chat completions and its responses.
import OpenAI from "openai";

import { note } from "./notes.mjs";

const READ = {
  async "openai-chat"(client, headers, say) {
    const asked = { model: "m", messages: [{ role: "user", content: "hello" }], stream: true };
    let reason;
    for await (const { choices } of await client.chat.completions.create(asked, { headers })) {
      say(choices[0].delta.content ?? "");
      reason = choices[0].finish_reason;
    }
    if (reason !== "stop") throw new Error("no finish_reason");
  },

  async "openai-responses"(client, headers, say) {
    let last;
    const asked = { model: "m", input: "hello", stream: true };
    for await (const event of await client.responses.create(asked, { headers })) {
      if (event.type === "response.output_text.delta") say(event.delta);
      last = event.type;
    }
    if (last !== "response.completed") throw new Error(`ended with ${last}`);
  },
};

await note(async ({ url, key, dialect }, say) => {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "k" });
  await READ[dialect](client, { "Idempotency-Key": key }, say);
});
