// relay's own relay-stream.js, in Node.
import { ask, subscribe } from "../../../relay/static/relay-stream.js";

import { note } from "./notes.mjs";

await note(async ({ url, path, key, stream }, say) => {
  let ended;
  const callbacks = {
    onFrame: ({ data }) => say(data),
    onControl: (control) => void (control.type === "run.ended" && (ended = control)),
  };
  const reading = stream
    ? subscribe(stream, { url, run: "current", ...callbacks })
    : await ask(`${url}${path}`, { headers: { "Idempotency-Key": key } }, callbacks);
  const { error } = await reading.done;
  if (error) throw error;
  if (ended?.status !== "completed") throw new Error(ended?.error ?? ended?.reason);
});
