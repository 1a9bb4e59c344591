"""What the tests of attacks share: a stream of somebody else's, and what a strict reader sees of a stream."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from guarded import PRODUCER_KEY, Answer, ask, bearer
from relay_process import RelayProcess

SECRET_TEXT = "the victim's words"

_LINE_END = re.compile(rb"\r\n|\r|\n")


class Victim(NamedTuple):
    """A stream with an open run `r`, in which something was said."""

    relay: RelayProcess
    stream: str
    writer: str

    @classmethod
    def of(cls, relay: RelayProcess, stream: str) -> Victim:
        runs = f"/relay/v1/streams/{stream}/runs"
        opened = ask(
            relay.url, "POST", runs, b'{"run": "r"}', Content_Type="application/json", **bearer(PRODUCER_KEY)
        )
        assert opened.status == 201, opened
        victim = cls(relay, stream, json.loads(opened.body)["writer"])
        victim.say(SECRET_TEXT)
        return victim

    def say(self, text: str) -> None:
        path = f"/relay/v1/streams/{self.stream}/runs/r/frames"
        body = json.dumps({"data": text}).encode()
        answer = ask(
            self.relay.url, "POST", path, body,
            Content_Type="application/json", Relay_Writer=self.writer, **bearer(PRODUCER_KEY),
        )  # fmt: skip
        assert answer.status == 200, answer

    def assert_untouched(self) -> None:
        """It is as its owner left it: one run, open, with what was said."""
        path = f"/relay/v1/streams/{self.stream}"
        known = json.loads(ask(self.relay.url, "GET", path, **bearer(PRODUCER_KEY)).body)
        assert (known["runs"], known["open_runs"], known["sealed"]) == (1, ["r"], False)
        transcript = ask(self.relay.url, "GET", f"{path}/runs/r/transcript", **bearer(PRODUCER_KEY))
        assert json.loads(transcript.body)["text"] == SECRET_TEXT


def leaks(answer: Answer) -> bool:
    """Whether an answer tells anything of a victim."""
    told = answer.body + repr(answer.headers).encode()
    return SECRET_TEXT.encode() in answer.body or b"relay-token" in told or b"open_runs" in answer.body


class Seen(NamedTuple):
    """An event as the standard dispatches it, and the id that it leaves behind."""

    id: str
    event: str
    data: str


def dispatched(wire: bytes) -> list[Seen]:
    """What an EventSource makes of bytes (WHATWG HTML section 9.2.6), written down without relay's parser."""
    seen: list[Seen] = []
    event, data, id_ = "", [], ""
    for line in _LINE_END.split(wire.removeprefix(b"\xef\xbb\xbf")):
        field, _, value = line.decode(errors="replace").partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                seen.append(Seen(id_, event, "\n".join(data)))
            event, data = "", []
        elif field == "event":
            event = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            id_ = value
    return seen
