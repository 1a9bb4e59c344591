"""What a client was told of an answer, and what every client of the matrix can be asked to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from recorded_answers import Answer

DEADLINE_S = 60

WHOLE = "whole"
"""How an answer ended of which the client says, in its own way, that it is all there. Any other ending begins
with `error: `."""


class Wish(NamedTuple):
    """Whom to ask. `url` is relay's, or that of what stands before it; `name` is the stream of the answer,
    the first part of its path, and the `Idempotency-Key` of clients that send one."""

    url: str
    name: str

    @property
    def base(self) -> str:
        return f"{self.url}/{self.name}"

    @property
    def events(self) -> str:
        return f"{self.url}/relay/v1/streams/{self.name}/events"


class Notes:
    """The text of an answer as a client hands it to its user, and how the answer ended, None so far."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._text = ""
        self._ending: str | None = None

    @property
    def text(self) -> str:
        return self._text

    def say(self, more: str) -> None:
        self.show(self._text + more)

    def show(self, whole: str) -> None:
        with self._changed:
            self._text = whole
            self._changed.notify_all()

    def end(self, how: str) -> None:
        with self._changed:
            self._ending = how
            self._changed.notify_all()

    def await_text(self, text: str) -> None:
        """Wait until this is what was handed out so far."""
        self._await(lambda: self._text == text, f"the text {text!r}")

    def await_end(self) -> str:
        """Wait for the end; how it ended."""
        self._await(lambda: self._ending is not None, "the end")
        assert self._ending is not None
        return self._ending

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        with self._changed:
            came = self._changed.wait_for(condition, DEADLINE_S)
        assert came, f"{what} did not come: {self._text!r}, {self._ending}"


class Kit(Protocol):
    """What clients run in."""

    def open_page(self, url: str) -> Page:
        """A tab of the browser with the clients' page from this origin."""

    def program(self, name: str) -> Program:
        """The running program of a JavaScript package."""


class Page(Protocol):
    """A tab."""

    def read(self, how: str, wish: dict[str, str]) -> Notes:
        """Have a reader of the page begin."""


class Program(Protocol):
    """A program that reads what it is wished."""

    def read(self, wish: dict[str, str]) -> Notes:
        """Have it begin."""


class Client:
    """A client as its users use it. Each method returns at once, with the notes of a reader that goes on."""

    answer: Answer
    """What it asks for."""

    raises = ""
    """How its error begins: the class, where it raises one that its users are to catch."""

    tells = True
    """Whether its error has relay's words for what happened; else it has words of its own."""

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        """Ask the agent. What is asked again under the same key is not asked twice."""
        raise NotImplementedError

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        """After a cut: most tell their user, who asks again under the same key and shows that answer."""
        assert cut.await_end() != WHOLE
        return self.ask(kit, wish)

    def join(self, kit: Kit, wish: Wish) -> Notes:
        """Join an answer that somebody else has asked for: by the same key, or a better way."""
        return self.ask(kit, wish)


class PythonClient(Client):
    """One whose answers a function reads; what it raises is how an answer ended."""

    def read(self, wish: Wish, notes: Notes) -> None:
        raise NotImplementedError

    def ask(self, kit: Kit, wish: Wish) -> Notes:
        return in_thread(lambda notes: self.read(wish, notes))


def in_thread(read: Callable[[Notes], None]) -> Notes:
    """Notes that a function takes in a thread of its own."""
    notes = Notes()

    def work() -> None:
        try:
            read(notes)
        except Exception as error:
            notes.end(f"error: {type(error).__name__}: {error}")
        else:
            notes.end(WHOLE)

    threading.Thread(target=work, daemon=True).start()
    return notes
