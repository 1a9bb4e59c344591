"""curl. Its user sees events, and the exit code."""

from __future__ import annotations

import json
import subprocess

from recorded_answers import OPENAI_CHAT

from clients.notes import DEADLINE_S, Client, Kit, Notes, Wish, in_thread
from relay.sse import EventStreamParser


class CurlError(Exception):
    """What its user sees instead of a whole answer."""


class Curl(Client):
    """`curl -N`, as README.md has it."""

    answer = OPENAI_CHAT

    def __init__(self) -> None:
        self._last_ids: dict[str, str] = {}

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        return in_thread(lambda notes: self._run(wish, notes, f"Idempotency-Key: {wish.name}"))

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        """With the last id that was seen; the text goes on below what stands there already."""
        assert cut.await_end().endswith((" 18", " 56"))  # a part of the answer, a failure to receive
        resume = f"Last-Event-ID: {self._last_ids[wish.name]}"

        def go_on(notes: Notes) -> None:
            notes.show(cut.text)
            self._run(wish, notes, resume)

        return in_thread(go_on)

    def _run(self, wish: Wish, notes: Notes, header: str) -> None:
        command = [
            "curl", "-sN", "-H", header, "-H", "Content-Type: application/json",
            "-d", '{"stream": true, "messages": [{"role": "user", "content": "hi"}]}',
            wish.base + self.answer.path,
        ]  # fmt: skip
        parser = EventStreamParser(2**20)
        said = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
            assert program.stdout is not None
            for line in program.stdout:
                for event in parser.feed(line):
                    self._last_ids[wish.name] = event.last_event_id
                    said = event.data.decode()
                    if said.startswith("{") and "choices" in (chunk := json.loads(said)):
                        notes.say(chunk["choices"][0]["delta"].get("content", ""))
            code = program.wait(DEADLINE_S)
        if code:
            raise CurlError(f"curl ended with {code}")
        if said != "[DONE]":
            raise CurlError(f"the last event is {said}")
