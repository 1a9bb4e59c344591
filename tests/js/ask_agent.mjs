// Asks an agent through the real client of its format; prints what it said of the answer.
// node ask_agent.mjs <ai-sdk|ag-ui> <url>
import { HttpAgent } from "@ag-ui/client";
import { DefaultChatTransport, readUIMessageStream } from "ai-6"; // the newest that Node 20 may run

const [format, url] = process.argv.slice(2);
const said = { text: "", error: null };

async function askAISDK() {
  const transport = new DefaultChatTransport({ api: url });
  const stream = await transport.sendMessages({ chatId: "c", messages: [], trigger: "submit-message" });
  for await (const message of readUIMessageStream({ stream, terminateOnError: true })) {
    said.text = message.parts.map((part) => (part.type === "text" ? part.text : "")).join("");
  }
}

async function askAGUI() {
  await new HttpAgent({ url }).runAgent(
    {},
    {
      onTextMessageContentEvent: ({ event }) => void (said.text += event.delta),
      onRunErrorEvent: ({ event }) => void (said.error = event.message),
    },
  );
}

try {
  await (format === "ai-sdk" ? askAISDK() : askAGUI());
} catch (error) {
  said.error = error.message;
}
console.log(JSON.stringify(said));
process.exit(0);
