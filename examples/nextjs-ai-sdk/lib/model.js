import { setTimeout } from "node:timers/promises";
import { MockLanguageModelV4 } from "ai/test";

/** The pause between two words. */
const PACE_MS = Number(process.env.PACE_MS ?? 80);

/** Stands in for a real one, which would be a line of its provider's: `openai("…")`. It says what it was told,
 * word by word, and stops when it is told to. */
export const model = new MockLanguageModelV4({
  doStream: async ({ prompt, abortSignal }) => ({ stream: ReadableStream.from(answer(prompt, abortSignal)) }),
});

async function* answer(prompt, signal) {
  const question = prompt.at(-1).content.map((part) => part.text).join("");
  yield { type: "stream-start", warnings: [] };
  yield { type: "text-start", id: "answer" };
  for (const word of `You said: ${question}. Say more, and so will I.`.match(/\S+\s*/g)) {
    await setTimeout(PACE_MS, undefined, { signal });
    yield { type: "text-delta", id: "answer", delta: word };
  }
  yield { type: "text-end", id: "answer" };
  yield {
    type: "finish",
    finishReason: { unified: "stop", raw: "stop" },
    usage: { inputTokens: {}, outputTokens: {} },
  };
}
