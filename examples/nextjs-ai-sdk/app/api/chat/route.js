import {
  consumeStream,
  convertToModelMessages,
  createUIMessageStreamResponse,
  generateId,
  streamText,
  toUIMessageStream,
} from "ai";
import { saveChat } from "../../../lib/chats.js";
import { model } from "../../../lib/model.js";

export async function POST(request) {
  const { id, messages } = await request.json();
  await saveChat(id, messages);
  const { stream } = streamText({
    model,
    messages: await convertToModelMessages(messages),
    // Who reloads the page or loses the connection leaves relay, not this request: only a stop ends it.
    abortSignal: request.signal,
  });
  return createUIMessageStreamResponse({
    stream: toUIMessageStream({
      stream,
      originalMessages: messages,
      // A message that has its id from here is the same one when it is resumed.
      generateMessageId: generateId,
      onEnd: ({ messages }) => saveChat(id, messages),
    }),
    // So that a stopped answer reaches `onEnd` too.
    consumeSseStream: consumeStream,
  });
}
