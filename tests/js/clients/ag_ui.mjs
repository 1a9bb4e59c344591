// The package `@ag-ui/client`.
import { HttpAgent } from "@ag-ui/client";

import { note } from "./notes.mjs";

// The package leaves a second promise of a cut run rejected, which would end the program.
process.on("unhandledRejection", () => {});

await note(async ({ url, path, key }, say) => {
  // Ids that it would make up are in the body, and another body is no repetition.
  const agent = new HttpAgent({ url: url + path, threadId: key, headers: { "Idempotency-Key": key } });
  let ended;
  await agent.runAgent(
    { runId: `run of ${key}` },
    {
      onTextMessageContentEvent: ({ event }) => void say(event.delta),
      onRunFinishedEvent: () => void (ended = "RUN_FINISHED"),
      onRunErrorEvent: ({ event }) => void (ended = event.message),
    },
  );
  if (ended !== "RUN_FINISHED") throw new Error(ended);
});
