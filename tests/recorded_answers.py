"""Answers of each format, as its servers send them: a whole one, and what belongs to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


def sse(payload: Any, name: str = "") -> bytes:
    """One event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(payload).encode() + b"\n\n"


def typed(kind: str, **members: Any) -> bytes:
    """An event that is named as its type, as OpenAI's responses and Anthropic have it."""
    return sse({"type": kind, **members}, kind)


def chunk(kind: str, **members: Any) -> bytes:
    """An event that only its type names, as the AI SDK and AG-UI have it."""
    return sse({"type": kind, **members})


@dataclass
class Answer:
    """A whole answer that says "Hello"; `shown` is how many events come before and with its text, of which
    the last is in the midst of it. `endings` are other last events, with the outcomes that they stand for."""

    dialect: str
    path: str
    events: list[bytes]
    shown: int
    parts: list[dict[str, Any]]
    error: bytes
    endings: list[tuple[list[bytes], tuple[str, str]]] = field(default_factory=list)
    headers: tuple[str, ...] = ()


RAW = Answer(
    "raw",
    "/say",
    [b"data: Hel\n\n", b"data: lo\n\n"],
    1,
    [{"kind": "text", "index": 0, "text": "Hello"}],
    b"",
)
"""Of a format that relay does not know, and that has no error of its own."""


def _completion(reason: str | None = None, **delta: str) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    whole = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return sse(whole)


_DONE = b"data: [DONE]\n\n"

OPENAI_CHAT = Answer(
    "openai-chat",
    "/v1/chat/completions",
    [
        _completion(role="assistant", content=""),
        _completion(reasoning_content="Hm."),
        _completion(content="Hel"),
        _completion(content="lo"),
        _completion("stop"),
        _DONE,
    ],
    3,
    [{"kind": "reasoning", "index": 0, "text": "Hm."}, {"kind": "text", "index": 0, "text": "Hello"}],
    sse({"error": {"message": "boom", "type": "server_error", "param": None, "code": "busy"}}),
)


def _response(status: str, **members: Any) -> dict[str, Any]:
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "status": status, "error": None,
        "incomplete_details": None, "instructions": None, "metadata": {}, "model": "m", "output": [],
        "parallel_tool_calls": True, "temperature": 1, "tool_choice": "auto", "tools": [], "top_p": 1,
        **members,
    }  # fmt: skip


_MESSAGE = {
    "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
}  # fmt: skip
_OF_MESSAGE = {"output_index": 1, "content_index": 0, "item_id": "msg_1"}
_REASONING = {"id": "rs_1", "type": "reasoning", "summary": []}

OPENAI_RESPONSES = Answer(
    "openai-responses",
    "/v1/responses",
    [
        typed("response.created", sequence_number=0, response=_response("in_progress")),
        typed("response.output_item.added", sequence_number=1, output_index=0, item=_REASONING),
        typed(
            "response.reasoning_summary_part.added", sequence_number=2, output_index=0, summary_index=0,
            item_id="rs_1", part={"type": "summary_text", "text": ""},
        ),
        typed(
            "response.reasoning_summary_text.delta", sequence_number=3, output_index=0, summary_index=0,
            item_id="rs_1", delta="Hm.",
        ),
        typed("response.output_item.done", sequence_number=4, output_index=0, item=_REASONING),
        typed(
            "response.output_item.added", sequence_number=4, output_index=1,
            item={**_MESSAGE, "status": "in_progress", "content": []},
        ),
        typed(
            "response.content_part.added", sequence_number=5, **_OF_MESSAGE,
            part={"type": "output_text", "text": "", "annotations": []},
        ),
        typed("response.output_text.delta", sequence_number=6, **_OF_MESSAGE, delta="Hel", logprobs=[]),
        typed("response.output_text.delta", sequence_number=7, **_OF_MESSAGE, delta="lo", logprobs=[]),
        typed("response.output_text.done", sequence_number=8, **_OF_MESSAGE, text="Hello", logprobs=[]),
        typed("response.output_item.done", sequence_number=9, output_index=1, item=_MESSAGE),
        typed(
            "response.completed", sequence_number=10,
            response=_response("completed", output=[_REASONING, _MESSAGE]),
        ),
    ],
    8,
    [{"kind": "reasoning", "index": 0, "text": "Hm."}, {"kind": "text", "index": 1, "text": "Hello"}],
    typed("error", sequence_number=9, code="server_error", message="boom", param=None),
    [
        (
            [typed("response.incomplete", sequence_number=9, response=_response("incomplete"))],
            ("completed", "upstream_end"),
        ),
        (
            [
                typed(
                    "response.completed", sequence_number=9,
                    response=_response("completed", output=[{"type": "mcp_approval_request", "id": "a"}]),
                )
            ],
            ("completed", "input_required"),
        ),
        (
            [typed("response.cancelled", sequence_number=9, response=_response("cancelled"))],
            ("cancelled", "upstream_cancelled"),
        ),
        (
            [
                typed(
                    "response.failed", sequence_number=9,
                    response=_response("failed", error={"code": "server_error", "message": "boom"}),
                )
            ],
            ("failed", "upstream_error"),
        ),
    ],
)  # fmt: skip

ANTHROPIC = Answer(
    "anthropic",
    "/v1/messages",
    [
        typed(
            "message_start",
            message={
                "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
                "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 1},
            },
        ),
        typed("ping"),
        typed("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
        typed("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "Hm."}),
        typed("content_block_stop", index=0),
        typed("content_block_start", index=1, content_block={"type": "text", "text": ""}),
        typed("content_block_delta", index=1, delta={"type": "text_delta", "text": "Hel"}),
        typed("content_block_delta", index=1, delta={"type": "text_delta", "text": "lo"}),
        typed("content_block_stop", index=1),
        typed(
            "content_block_start", index=2,
            content_block={"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
        ),
        typed("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": "{}"}),
        typed("content_block_stop", index=2),
        typed("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 9}),
        typed("message_stop"),
    ],
    7,
    [{"kind": "reasoning", "index": 0, "text": "Hm."}, {"kind": "text", "index": 1, "text": "Hello"}],
    typed("error", error={"type": "overloaded_error", "message": "boom"}),
)  # fmt: skip

_APPROVAL = chunk("tool-approval-request", approvalId="a1", toolCallId="c1")

AI_SDK = Answer(
    "ai-sdk",
    "/api/chat",
    [
        chunk("start"),
        chunk("start-step"),
        chunk("reasoning-start", id="r1"),
        chunk("reasoning-delta", id="r1", delta="Hm."),
        chunk("reasoning-end", id="r1"),
        chunk("text-start", id="t1"),
        chunk("text-delta", id="t1", delta="Hel"),
        chunk("text-delta", id="t1", delta="lo"),
        chunk("text-end", id="t1"),
        chunk("tool-input-start", toolCallId="c1", toolName="f"),
        chunk("tool-input-available", toolCallId="c1", toolName="f", input={}),
        chunk("finish-step"),
        chunk("finish", finishReason="stop"),
        _DONE,
    ],
    7,
    [{"kind": "reasoning", "index": "r1", "text": "Hm."}, {"kind": "text", "index": "t1", "text": "Hello"}],
    chunk("error", errorText="boom"),
    [
        ([chunk("finish")], ("completed", "upstream_end")),
        ([_APPROVAL, chunk("finish-step"), chunk("finish"), _DONE], ("completed", "input_required")),
        ([_APPROVAL], ("failed", "upstream_truncated")),
        ([chunk("abort", reason="stopped"), _DONE], ("cancelled", "upstream_cancelled")),
    ],
    ("x-vercel-ai-ui-message-stream: v1",),
)

_IDS = {"threadId": "th1", "runId": "run1"}
_INTERRUPTS = [{"id": "i1", "reason": "approval"}]

AG_UI = Answer(
    "ag-ui",
    "/agent",
    [
        chunk("RUN_STARTED", **_IDS),
        chunk("REASONING_START", messageId="r1"),
        chunk("REASONING_MESSAGE_START", messageId="r1", role="reasoning"),
        chunk("REASONING_MESSAGE_CONTENT", messageId="r1", delta="Hm."),
        chunk("REASONING_MESSAGE_END", messageId="r1"),
        chunk("REASONING_END", messageId="r1"),
        chunk("TEXT_MESSAGE_START", messageId="m1", role="assistant"),
        chunk("TEXT_MESSAGE_CONTENT", messageId="m1", delta="Hel"),
        chunk("TEXT_MESSAGE_CONTENT", messageId="m1", delta="lo"),
        chunk("TEXT_MESSAGE_END", messageId="m1"),
        chunk("RUN_FINISHED", **_IDS),
    ],
    8,
    [{"kind": "reasoning", "index": "r1", "text": "Hm."}, {"kind": "text", "index": "m1", "text": "Hello"}],
    chunk("RUN_ERROR", message="boom"),
    [
        (
            [chunk("RUN_FINISHED", **_IDS, outcome={"type": "interrupt", "interrupts": _INTERRUPTS})],
            ("completed", "input_required"),
        ),
        (
            [chunk("RUN_FINISHED", **_IDS, outcome={"type": "cancelled"})],
            ("cancelled", "upstream_cancelled"),
        ),
        (
            [chunk("RUN_FINISHED", **_IDS), chunk("RUN_STARTED", **_IDS), chunk("RUN_FINISHED", **_IDS)],
            ("completed", "upstream_end"),
        ),
        (
            [chunk("RUN_FINISHED", **_IDS), chunk("RUN_STARTED", **_IDS)],
            ("failed", "upstream_truncated"),
        ),
    ],
)


def _said(text: str) -> list[dict[str, Any]]:
    return [{"id": "m1", "type": "AIMessageChunk", "content": text}]


LANGGRAPH = Answer(
    "langgraph",
    "/threads/th1/runs/stream",
    [
        sse({"run_id": "run1", "attempt": 1}, "metadata"),
        sse({"messages": []}, "values"),
        sse({"m1": {"metadata": {}}}, "messages/metadata"),
        sse(_said("Hel"), "messages/partial"),
        sse(_said("Hello"), "messages/partial"),
        sse({"messages": _said("Hello")}, "values"),
        sse(None, "end"),
    ],
    4,
    [{"kind": "text", "index": "m1", "text": "Hello"}],
    sse({"error": "ValueError", "message": "boom"}, "error"),
    [
        ([], ("completed", "upstream_end")),
        (
            [sse({"__interrupt__": [{"value": "Approve?", "id": "i1"}]}, "updates")],
            ("completed", "input_required"),
        ),
        (
            [sse({"error": "UserInterrupt", "message": "User interrupted the run"}, "error")],
            ("cancelled", "upstream_cancelled"),
        ),
    ],
)

ANSWERS = [OPENAI_CHAT, OPENAI_RESPONSES, ANTHROPIC, AI_SDK, AG_UI, LANGGRAPH]
