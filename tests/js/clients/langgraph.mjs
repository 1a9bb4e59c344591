// The package `@langchain/langgraph-sdk`.
import { Client } from "@langchain/langgraph-sdk";

import { note } from "./notes.mjs";

await note(async ({ url, key }, say, show) => {
  const client = new Client({ apiUrl: url, defaultHeaders: { "Idempotency-Key": key } });
  for await (const { event, data } of client.runs.stream("th1", "agent", { input: {}, streamMode: "messages" })) {
    if (event === "messages/partial") show(data[0].content);
    if (event === "error") throw new Error(data.message);
  }
});
