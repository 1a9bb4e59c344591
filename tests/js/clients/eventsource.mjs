// The package `eventsource`. An EventSource has read all when the answer is 204 and it is closed.
import { EventSource } from "eventsource";

import { note } from "./notes.mjs";

await note(
  ({ url }, say) =>
    new Promise((resolve, reject) => {
      const source = new EventSource(url);
      let ended = null;
      source.onmessage = ({ data }) => say(data);
      source.addEventListener("relay", ({ data }) => {
        const control = JSON.parse(data);
        if (control.type === "run.ended") ended = control;
      });
      source.onerror = () => {
        if (source.readyState !== EventSource.CLOSED) return;
        if (ended && ended.status !== "completed") reject(new Error(ended.error ?? ended.reason));
        else resolve();
      };
    }),
);
