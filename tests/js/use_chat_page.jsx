// A chat page as people write it: `useChat`, and beside it what is kept of the conversation.
import { Chat, useChat } from "@ai-sdk/react";
import { StrictMode, useEffect } from "react";
import { createRoot } from "react-dom/client";
import { RelayChatTransport } from "/relay/static/relay-stream.js";

const { chat: id, transport } = Object.fromEntries(new URLSearchParams(location.search));
const relay = transport === "relay" ? new RelayChatTransport() : undefined;

const kept = { id, messages: JSON.parse(localStorage.getItem(id)) ?? [], transport: relay };
const own = transport === "default-in-own-chat" && { chat: new Chat(kept) };

function Page() {
  const chat = useChat({ resume: true, ...(own || kept) });
  const { messages, status, error } = chat;
  // For the tests to act on. An app has buttons for it.
  window.chat = chat;
  // At every change, so that a reload begins with half an answer, which the resumed one must not follow.
  useEffect(() => localStorage.setItem(id, JSON.stringify(messages)), [messages]);
  return (
    <>
      {messages.map(({ id, role, parts }) => (
        <p key={id} data-role={role}>
          {parts.map((part) => part.text)}
        </p>
      ))}
      <output>{status}</output>
      <strong>{error?.message}</strong>
    </>
  );
}

// What the AI SDK's documentation has a Stop button do. `stop()` alone only leaves.
window.stopAnswer = async () => {
  if (relay) await relay.cancel(id);
  else await fetch(`/api/chat/${encodeURIComponent(id)}/stop`, { method: "POST" });
  await window.chat.stop();
};

createRoot(document.body.appendChild(document.createElement("main"))).render(
  <StrictMode>
    <Page />
  </StrictMode>,
);
