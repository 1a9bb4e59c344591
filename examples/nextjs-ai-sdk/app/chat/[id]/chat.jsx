"use client";

import { useChat } from "@ai-sdk/react";

export function Chat({ id, kept }) {
  const { messages, sendMessage, stop, status, error } = useChat({ id, messages: kept, resume: true });

  const ask = (form) => sendMessage({ text: form.get("question") });

  // `stop()` alone only leaves; the answer would go on, and be there after a reload.
  const stopAnswer = async () => {
    await fetch(`/api/chat/${id}/stop`, { method: "POST" });
    await stop();
  };

  return (
    <main>
      {messages.map(({ id, role, parts }) => (
        <p key={id} className={role}>
          {role === "user" ? "🧑 " : "🤖 "}
          {parts.map((part) => (part.type === "text" ? part.text : ""))}
        </p>
      ))}
      {error && <p role="alert">{error.message}</p>}
      <form action={ask}>
        <input name="question" aria-label="Question" autoFocus />
        <button disabled={status === "submitted" || status === "streaming"}>Ask</button>
        <button type="button" onClick={stopAnswer}>
          Stop
        </button>
        <output> {status}</output>
      </form>
    </main>
  );
}
