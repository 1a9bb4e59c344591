"""The JavaScript packages, each in a Node program of tests/js/clients that reads all wishes of a worker."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from recorded_answers import AG_UI, AI_SDK, ANTHROPIC, LANGGRAPH, OPENAI_CHAT, OPENAI_RESPONSES, RAW, Answer

from clients.events_route import EventsRouteClient
from clients.notes import Client, Kit, Notes, Wish

FOLDER = Path(__file__).resolve().parent.parent / "js" / "clients"


class NodeProgram:
    """One of them while it runs."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            ["node", FOLDER / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._numbers = itertools.count()
        self._notes: dict[int, Notes] = {}
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    @classmethod
    @contextlib.contextmanager
    def running(cls, name: str) -> Iterator[NodeProgram]:
        program = cls(name)
        try:
            yield program
        finally:
            program.stop()

    def read(self, wish: dict[str, str]) -> Notes:
        notes, number = Notes(), next(self._numbers)
        self._notes[number] = notes
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wish | {"number": number}) + "\n")
        self._process.stdin.flush()
        return notes

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            note = json.loads(line)
            notes = self._notes[note["wish"]]
            if "text" in note:
                notes.say(note["text"])
            elif "whole" in note:
                notes.show(note["whole"])
            else:
                notes.end(note["end"])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listening.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class NodeClient(Client):
    """A package that asks with a key."""

    def __init__(self, program: str, answer: Answer, *, returns: bool = False) -> None:
        self._program = program
        self.answer = answer
        self._returns = returns
        """Whether it comes back by itself."""

    def wish(self, wish: Wish) -> dict[str, str]:
        """What the program needs to know."""
        return {
            "url": wish.base,
            "path": self.answer.path,
            "dialect": self.answer.dialect,
            "key": wish.name,
            "chat": "c",
        }

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        return kit.program(self._program).read(self.wish(wish))

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        return cut if self._returns else super().come_back(kit, wish, cut)


class ChatTransport(NodeClient):
    """The AI SDK's, whose way back is its `reconnectToStream`."""

    tells = False

    def __init__(self) -> None:
        super().__init__("ai_sdk.mjs", AI_SDK)

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        assert cut.await_end() != "whole"
        return self.join(kit, wish)

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return kit.program(self._program).read(self.wish(wish) | {"reconnect": "yes"})


class RelayStreamInNode(NodeClient):
    """`ask`, and `subscribe` for those who join."""

    def __init__(self) -> None:
        super().__init__("relay_stream.mjs", RAW, returns=True)

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return kit.program(self._program).read({"url": wish.url, "stream": wish.name})


class EventSourceInNode(NodeClient):
    """The package `eventsource` on the backend's own path."""

    def __init__(self) -> None:
        super().__init__("eventsource.mjs", RAW, returns=True)

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        return kit.program(self._program).read({"url": wish.base + self.answer.path})

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return kit.program(self._program).read({"url": f"{wish.base}/answer"})


class EventSourceInNodeOnEvents(EventsRouteClient):
    """The same on the events route."""

    answer = RAW

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return kit.program("eventsource.mjs").read({"url": f"{wish.events}?run=latest"})


OPENAI_CHAT_IN_NODE = NodeClient("openai.mjs", OPENAI_CHAT)
OPENAI_RESPONSES_IN_NODE = NodeClient("openai.mjs", OPENAI_RESPONSES)
ANTHROPIC_IN_NODE = NodeClient("anthropic.mjs", ANTHROPIC)
LANGGRAPH_IN_NODE = NodeClient("langgraph.mjs", LANGGRAPH, returns=True)
AG_UI_IN_NODE = NodeClient("ag_ui.mjs", AG_UI)
