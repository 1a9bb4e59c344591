"""A client that comes and goes, keeps nothing but its last id, and checks everything it is told."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from model.plain_list import BEFORE_FIRST, Node, Position, Shown, State, Stream, leads_on

from relay.app import App
from relay.replay.response import CONNECTION


class Block(NamedTuple):
    """What a client reads at once: an event, a comment with an id, or an NDJSON line."""

    id: str
    event: str
    data: str
    run: str | None = None
    comment: str = ""
    dispatched: bool = True


class EventStream:
    """The EventSource rules in their plainest form, with comments kept. Not relay's own parser."""

    def __init__(self) -> None:
        self._rest = b""
        self._id = ""

    def feed(self, data: bytes) -> list[Block]:
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        blocks = []
        for text in whole:
            event, lines, comments = "", [], []
            for line in text.decode().split("\n"):
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "":
                    comments.append(value)
                elif name == "id":
                    self._id = value
                elif name == "event":
                    event = value
                elif name == "data":
                    lines.append(value)
            blocks.append(Block(self._id, event, "\n".join(lines), None, "\n".join(comments), bool(lines)))
        return blocks


class Lines:
    """NDJSON."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Block]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [from_object(json.loads(line)) for line in whole if line]


def from_object(frame: dict[str, Any]) -> Block:
    return Block(frame["id"], frame["event"], frame["data"], frame["run"])


@dataclass(frozen=True)
class Wish:
    """What a client asks for. `kind`: events, envelope, ndjson, json (a page a connection) or proxied."""

    kind: str
    control: str
    run: str | None
    after: str

    @property
    def shows_control(self) -> bool:
        return self.control == "events" and self.kind != "proxied"

    @property
    def tells_loss(self) -> bool:
        if self.kind in ("json", "proxied"):
            return False
        return self.control == "events" if self.kind == "ndjson" else self.control != "none"


class Violation(AssertionError):
    """A promise was broken."""


class Connection:
    """What relay's server gives a response of the connection under it."""

    def __init__(self, client: Client) -> None:
        self.on_lost: Callable[[], None] | None = None
        self.more_headers: list[tuple[bytes, bytes]] = []
        self._client = client

    @property
    def lost(self) -> bool:
        return self._client.gone

    @property
    def response_started(self) -> bool:
        return self._client.status > 0

    def begin_stream(self) -> None:
        assert not self.response_started

    @property
    def writable(self) -> bool:
        return self._client.stalled is None

    async def until_writable(self) -> None:
        if self._client.stalled is not None:
            await self._client.stalled.wait()

    def write(self, data: bytes) -> bool:
        self._client.take(data)
        return self.writable

    def abort(self) -> None:
        asyncio.get_running_loop().call_soon(self._client.leave)

    def finish_and_abort(self) -> None:
        self._client.broken_off = True


class Client:
    """One reader with its checks. Bytes come in by `send`, and are looked at when the system is at rest."""

    def __init__(self, number: int, stream: Stream, wish: Wish, token: str = "") -> None:
        self.number = number
        self.stream = stream
        self.wish = wish
        self.token = token
        self.shown = Shown(wish.run, wish.shows_control)
        self.position: Position | None = None
        self.established = 0
        """The state in which a position that is not a frame's was given out."""
        self.task: asyncio.Task[None] | None = None
        self.stalled: asyncio.Event | None = None
        self.log: list[str] = []
        self._reset_connection(0, 0)

    def __repr__(self) -> str:
        at = None if self.position is None else self.position.text
        return f"client {self.number} of {self.stream.name} {self.wish} at {at}"

    def _reset_connection(self, connected_at: int, since: int) -> None:
        self.connected_at, self.since = connected_at, since
        self.status = 0
        self.problem: dict[str, Any] = {}
        self.inbox: list[bytes] = []
        self.cut_after: int | None = None
        self.gone = False
        self.unclear = False
        self.answered = False
        self.raced = False
        """Whether the journal was rewound while relay put an answer together: what it read of the stream and
        of the run can be of two forks, and then it may wait for an end that was in the other one."""
        self.broken_off = False
        self.ended = False
        self.bye = ""
        self.live = 0
        self.fresh = True
        self.resumes = False
        self.hello: dict[str, Any] | None = None
        self.connection = Connection(self)
        self._gunzip: Any = None
        self._parser = Lines() if self.wish.kind == "ndjson" else EventStream()
        self._page = b""

    # Coming and going

    @property
    def connected(self) -> bool:
        return self.task is not None

    def connect(self, app: App, loop: asyncio.AbstractEventLoop, since: int) -> None:
        """Ask for the stream from the last id on, as a client does that knows nothing else."""
        assert self.task is None
        self._reset_connection(len(self.stream.states) - 1, since)
        headers = []
        query = []
        path = f"/relay/v1/streams/{self.stream.name}/events"
        if self.wish.kind == "proxied":
            path = "/anything"
            cursor = "0-0" if self.position is None else self.position.text
            headers.append((b"last-event-id", f"rly.{self.token}.{cursor}".encode()))
        else:
            query = [f"control={self.wish.control}"]
            if self.wish.run is not None:
                query.append(f"run={self.wish.run}")
            if self.wish.kind == "envelope":
                query.append("envelope=json")
            if self.wish.kind == "json":
                query.append("limit=3")
            accept = {"ndjson": "application/x-ndjson", "json": "application/json"}.get(self.wish.kind)
            headers.append((b"accept", (accept or "text/event-stream").encode()))
            if self.position is None:
                query.append(f"after={self.wish.after}")
            elif self.number % 2:
                query.append(f"after={self.position.text}")
            else:
                headers.append((b"last-event-id", self.position.text.encode()))
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": "&".join(query).encode(),
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "extensions": {CONNECTION: self.connection},
        }
        if self.number % 3 == 0:
            headers.append((b"accept-encoding", b"gzip"))
        self.log.append(f"connect at state {self.connected_at}: {'&'.join(query)} {headers[-1][1].decode()}")
        self.task = loop.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        raise AssertionError("relay has no reason to read a GET's body")

    async def _send(self, message: Any) -> None:
        if self.stalled is not None:
            await self.stalled.wait()
        if self.gone:
            return
        if message["type"] == "http.response.start":
            if self.status:
                raise Violation(f"{self}: a second response was started")
            self.status = message["status"]
            if (b"content-encoding", b"gzip") in message["headers"]:
                self._gunzip = zlib.decompressobj(31)
            return
        self.take(message["body"])
        if not message.get("more_body", False):
            self.ended = True
            if self._gunzip is not None and not self._gunzip.eof:
                raise Violation(f"{self}: a whole answer holds a piece of a gzip member")

    def take(self, data: bytes) -> None:
        """A piece of a body came."""
        if self.gone:
            return
        if self._gunzip is not None:
            data = self._gunzip.decompress(data)
        if self.cut_after is not None and len(data) >= self.cut_after:
            self.inbox.append(data[: self.cut_after])
            self.gone = True
            asyncio.get_running_loop().call_soon(self.leave)  # nobody is told so while he writes
            return
        if self.cut_after is not None:
            self.cut_after -= len(data)
        self.inbox.append(data)

    def leave(self) -> None:
        """The connection is lost."""
        self.gone = True
        self.go_on()
        if self.connection.on_lost is not None:
            self.connection.on_lost()

    def stall(self) -> None:
        """Take nothing more for now."""
        if self.stalled is None:
            self.stalled = asyncio.Event()

    def go_on(self) -> None:
        """Take what comes again."""
        if self.stalled is not None:
            self.stalled.set()
            self.stalled = None

    # Looking at what came

    def look(self) -> None:
        """Check everything that came since last time; the stream's states are those of now."""
        if self.status == 200 and self.wish.run == "current":
            self._choose_run()
        streaming = self.status == 200 and self.wish.kind != "json"
        if self.status and not self.answered:
            self.answered = True
            self.raced = _rewound(self._states_connected())
        inbox, self.inbox = self.inbox, []
        if self.unclear:
            inbox = []
        for data in inbox:
            if streaming:
                for block in self._parser.feed(data):
                    self._block(block)
            else:
                self._page += data
        if self.task is None or not self.task.done():
            return
        task, self.task = self.task, None
        if task.exception() is not None:
            self.stream.broken = True
        task.result()
        if self.gone:
            self.log.append("gone")
        elif self.status != 200:
            self._refused()
        elif self.wish.kind == "json":
            self._json_page()
        else:
            self._over()

    def _fail(self, what: str) -> None:
        log = "\n  ".join(self.log[-30:])
        states = "\n  ".join(
            f"{number}: life {state.life} earliest {state.earliest} newest {list(state.path())[:12][::-1]}"
            for number, state in enumerate(self.stream.states[self.since :], self.since)
        )
        self.log.append(what)
        self.stream.broken = True
        raise Violation(f"{self}: {what}\n  {log}\nstates since:\n  {states}")

    def _states(self) -> list[State]:
        """What the stream was since this client was last known to be served in full."""
        return self.stream.states[self.since :]

    def _states_connected(self) -> list[State]:
        return self.stream.states[self.connected_at :]

    def _choose_run(self) -> None:
        runs = {state.open_runs()[-1] if state.open_runs() else "" for state in self._states_connected()}
        runs.discard("")
        if not runs:
            return  # it can only have been asked to come back; a frame would be one it did not ask for
        if len(runs) > 1:
            self.unclear = True  # nobody says which of them it was given
            self.leave()
            return
        name = runs.pop()
        self.wish = replace(self.wish, run=name)
        self.shown = Shown(name, self.wish.shows_control)

    def _stand(self, position: Position, why: str) -> None:
        self.position = position
        self.established = len(self.stream.states) - 1
        self.log.append(f"{why} {position.text}")

    def _block(self, block: Block) -> None:
        if self.wish.kind == "envelope" and block.dispatched:
            block = from_object(json.loads(block.data))
        if self.wish.kind == "proxied":
            prefix = f"rly.{self.token}."
            if not block.id.startswith(prefix):
                self._fail(f"an id of another shape: {block.id}")
            block = block._replace(id=block.id.removeprefix(prefix))
        if not block.dispatched:
            for line in block.comment.split("\n"):
                if line.startswith("relay {"):
                    self._control(block.id, json.loads(line.removeprefix("relay ")))
            return
        control = json.loads(block.data) if block.event == "relay" else None
        if control is not None and control["type"] in ("hello", "gap", "reset", "live", "bye", "heartbeat"):
            if not self.wish.shows_control:
                self._fail(f"it did not ask for {control}")
            self._control(block.id, control)
        else:
            self._frame(block)

    def _frame(self, block: Block) -> None:
        self.log.append(f"frame {block.id} {block.event} {block.data[:30]!r}")
        self._settle_hello(block.id)
        if self.bye:
            self._fail("a frame after bye")
        node = self.stream.nodes.get(block.id)
        if node is None:
            self._fail(f"no frame has the id {block.id}")
            return
        if not self.shown(node):
            self._fail(f"it did not ask for {node}")
        # An event stream has one line end; NDJSON and JSON carry the text as it is.
        text = node.data.decode()
        if self.wish.kind in ("events", "proxied"):
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if (block.event, block.data) != (node.event, text) or block.run not in (None, node.run):
            self._fail(f"{block} is not what was journaled: {node}")
        self._advance(node)
        self._stand(Position(node.id, node.seq, node), "at")
        self.fresh = False

    def _starts(self) -> list[Position]:
        """Where a first connection may begin."""
        starts = []
        for state in self._states_connected():
            if self.wish.run is not None:
                if self.wish.after == "tail" and state.head is not None:
                    starts.append(_at(state.head))
                elif self.wish.run in state.runs:
                    start = state.runs[self.wish.run].start
                    starts.append(_at(start) if start else BEFORE_FIRST)
            elif self.wish.after == "tail" and state.head is not None:
                starts.append(_at(state.head))
            elif state.exists:
                starts.append(Position("", state.earliest - 1))
        return starts

    def _advance(self, node: Node) -> None:
        """Check that `node` may come after what this client has."""
        if self.position is None:
            if not any(leads_on(start, node, self.shown) for start in self._starts()):
                self._fail(f"{node} is not where it should begin")
            return
        if leads_on(self.position, node, self.shown):
            return
        # What cannot be checked is let pass: the frame under the cursor is trimmed, the next one is there.
        # relay's cursor may be ahead of this client's, by frames that are not shown.
        hidden = [
            _at(other)
            for other in self.stream.nodes.values()
            if not self.shown(other) and leads_on(self.position, other, self.shown)
        ]
        for at in (self.position, *hidden):
            doubtful = any(at.unverifiable(state) or self._is_passed(at, state) for state in self._states())
            if doubtful and leads_on(Position(at.text, at.seq), node, self.shown):
                return
        self._fail(f"{node} does not follow {self.position.text}")

    def _is_passed(self, at: Position, state: State) -> bool:
        """Whether the frame here is trimmed, and the run that is asked for begins behind it: whichever frame
        it was, nothing of the run is missed."""
        run = None if self.wish.run is None else state.runs.get(self.wish.run)
        begins = -1 if run is None or run.start is None else run.start.seq
        return at.seq < state.earliest and at.seq <= begins and not at.is_before(state)

    # Control frames of the connection

    def _control(self, id_: str, control: dict[str, Any]) -> None:
        kind = control["type"]
        if kind in ("run.started", "run.superseded", "run.ended"):  # a journaled one, shown as a comment
            node = self.stream.nodes.get(id_)
            if node is None or json.loads(node.data) != control:
                self._fail(f"{id_} {control} is not what was journaled")
                return
            self._settle_hello(id_)
            self._advance(node)
            self._stand(Position(node.id, node.seq, node), "comment")
            self.fresh = False
            return
        self.log.append(f"{kind} {id_} {control}")
        if self.bye:
            self._fail(f"{kind} after bye")
        if kind == "hello":
            self._hello(id_, control)
            return
        if kind in ("gap", "reset"):
            resumed = self.fresh and self.hello is not None and self.hello["resumed"]
            # It may have resumed, been moved behind frames that are not shown, and lost what came after.
            moved = kind == "gap" and self.position is not None and control["requested"] != self.position.text
            if resumed and not moved:
                self._fail("it is said to have resumed, and then told that it has not")
            if kind == "gap":
                self._gap(id_, control)
            else:
                self._reset(id_, control)
            self.fresh = False
            return
        if kind == "bye":
            self.bye = control["reason"]
            if id_ and self.hello is not None:
                self._moved(id_)
            return
        self._settle_hello(id_)
        self.fresh = False
        self._moved(id_)
        if kind == "live":
            self.live += 1
            if self.live > 1:
                self._fail("it was told live twice")

    def _hello(self, id_: str, control: dict[str, Any]) -> None:
        if self.hello is not None:
            self._fail("a second hello")
        self.hello = control
        if control["cursor"] != id_ or control["stream"] != self.stream.name:
            self._fail("hello contradicts itself")
        if control["resumed"] and self.position is None:
            self._fail("it is said to have resumed, and presented nothing")
        if self.position is not None:
            self.resumes = True
            self._moved(id_)
            return
        self.resumes = False
        self._stand_at_start(id_)
        if self.position is None:
            self._fail(f"it should not begin at {id_}")

    def _stand_at_start(self, id_: str) -> None:
        seq = int(id_.split("-")[0])
        node = self.stream.nodes.get(id_)
        for start in self._starts():
            if start.seq == seq and (start.node is None or start.node is node):
                self._stand(Position(id_, seq, start.node), "start")
                return

    def _settle_hello(self, id_: str) -> None:
        """The first thing after hello shows whether hello told the truth of the resume."""
        if self.fresh and self.hello is not None and self.resumes and not self.hello["resumed"]:
            self._fail(f"it is said not to have resumed, and is not told why before {id_}")

    def _moved(self, id_: str) -> None:
        """A position this connection states without a frame: only unshown frames may be in between."""
        if self.position is not None and id_ == self.position.text:
            return
        node = self.stream.nodes.get(id_)
        if node is None:
            self._fail(f"nobody can stand at {id_}")
            return
        at = self.position
        if at is not None and at.node is None and at.seq == node.seq:
            self._stand(_at(node), "made exact")  # after a loss only the seq was known
            return
        if self.shown(node):
            self._fail(f"{id_} is stated as its position, and it was not shown that frame")
        self._advance(node)
        self._stand(Position(id_, node.seq, node), "moved to")

    def _gap(self, id_: str, control: dict[str, Any]) -> None:
        if control["requested"] != (self.position.text if self.position else ""):
            self._moved(control["requested"])
        assert self.position is not None
        seq = int(id_.split("-")[0])
        earliest = control.get("earliest")  # left out when no frame is held, or the journal is away
        if earliest is not None and int(earliest.split("-")[0]) != seq + 1:
            self._fail("gap contradicts itself")
        if seq <= self.position.seq:
            self._fail(f"gap before {seq + 1}, and it has more than that: nothing was lost")
        states = self._states_connected() if self.fresh else self._states()
        if not any(state.exists and state.earliest == seq + 1 for state in states):
            self._fail(f"gap to {seq + 1}, which was never the earliest frame")
        self._stand(Position(id_, seq), "gap to")

    def _reset(self, id_: str, control: dict[str, Any]) -> None:
        position = self.position
        assert position is not None
        states = self._states_connected() if self.fresh else self._states()
        seq = int(id_.split("-")[0])
        if not any(state.exists and state.earliest == seq + 1 for state in states):
            self._fail(f"reset to {seq + 1}, which was never the earliest frame")
        if not self._lost_touch(states):
            self._fail("reset, and its position is still where it was")
        before = [position.is_before(state) for state in states]
        if self.fresh and control["reason"] != "recreated" and all(before):
            self._fail("its cursor is older than the stream, and it is not told that this was recreated")
        if control["reason"] == "recreated" and not any(before):
            self._fail("it was not recreated")
        self.live = 0
        self._stand(Position(id_, seq), "reset to")

    def _lost_touch(self, states: list[State]) -> bool:
        """Whether the stream, at some time, did not go on from where this client stands."""
        position = self.position
        assert position is not None
        if any(state.exists and not position.within(state) for state in states):
            return True
        # relay may have been further on than what it had to show, or stand where no frame is.
        if self.fresh and position.node is not None:
            return False
        since = self.established if position.node is None else self.since
        history = self.stream.states[min(since, self.since) :]
        return _rewound(history) or any(not state.exists for state in history)

    # Ends

    def _refused(self) -> None:
        body = json.loads(self._page) if self._page else {}
        code = body.get("code", "")
        self.log.append(f"status {self.status} {code}")
        states = self._states_connected()
        wish = self.wish
        run = "" if wish.run == "current" else wish.run
        if self.status == 204:
            if not any(self._nothing_left(state) for state in states) and not self._just_ended(states):
                self._fail("204, and there is something left")
            self.bye = "no content"
        elif self.status == 404:
            unknown = any(not state.exists or (run and run not in state.runs) for state in states)
            # The run that was current may be gone when it is looked at.
            unknown = unknown or (wish.run == "current" and _rewound(states))
            if not unknown or wish.kind == "proxied":
                self._fail(f"404 {code}, and it exists")
            self.position = None
        elif self.status == 410 and code == "cursor_gone":
            if wish.tells_loss:
                self._fail("410, and it could have been told in band")
            if self.position is not None and not any(self._is_lost(state) for state in states):
                self._fail("410, and nothing was lost")
            # The journal may have been changed between two looks at it.
            if self.position is None and len(states) == 1 and states[0].earliest == 1:
                self._fail("410 to one that presented nothing, and nothing is trimmed")
            self.bye = "gone" if self.position is None else ""
            self.position = None
        elif self.status == 410 and wish.kind == "proxied":
            known = all(any(r.token == self.token for r in state.runs.values()) for state in states)
            if known:
                self._fail("410, and its run is there")
            self.bye = "gone"
        elif self.status != 503:
            self._fail(f"status {self.status}: {body}")

    def _just_ended(self, states: list[State]) -> bool:
        """Whether a run that was current ended, with nothing to show, while relay looked at it."""
        if self.position:
            after = self.position.seq
        else:
            after = max(state.top for state in states) if self.wish.after == "tail" else 0
        names = {state.open_runs()[-1] for state in states if state.open_runs()}
        return self.wish.run == "current" and any(
            name in state.runs
            and state.over(name)
            and not state.remains(Shown(name, self.wish.shows_control), after)
            for name in names
            for state in states
        )

    def _nothing_left(self, state: State) -> bool:
        if self.wish.run == "current":
            return state.exists and not state.open_runs()
        if not state.exists or (self.wish.run is not None and self.wish.run not in state.runs):
            return False
        if not state.over(self.wish.run):
            return False
        position = self.position
        if position is None:
            if self.wish.after == "tail":
                return True
            return not state.remains(self.shown, 0 if self.wish.run else state.earliest - 1)
        if not position.within(state) and (position.seq >= state.earliest or position.is_before(state)):
            return False  # where the frame under the cursor is trimmed, nobody can tell
        return not state.remains(self.shown, position.seq)

    def _is_lost(self, state: State) -> bool:
        position = self.position
        assert position is not None
        if not state.exists:
            return False
        return (
            not position.within(state)
            or state.earliest - 1 > position.seq
            or (position.node is None and self._lost_touch([state]))
        )

    def _json_page(self) -> None:
        page = json.loads(self._page)
        self.log.append(f"page of {len(page['frames'])} to {page['cursor']}")
        for frame in page["frames"]:
            self._frame(from_object(frame))
        seq = int(page["cursor"].split("-")[0])
        if self.position is None:
            self._stand_at_start(page["cursor"])
        if self.position is None or seq > self.position.seq:
            self._moved(page["cursor"])
        states = self._states_connected()
        if page["ended"] and not any(self._nothing_left(state) for state in states):
            self._fail("the page is said to be the last, and there is more to come")
        if not page["more"] and all(state.remains(self.shown, seq) for state in states):
            self._fail("the page is said to be all there is, and there is more")

    def _over(self) -> None:
        states = self._states()
        self.log.append(f"over: bye {self.bye!r} broken off {self.broken_off}")
        if self.ended == self.broken_off:
            self._fail("a response ends, or is broken off")
        if self.broken_off:
            if self.wish.tells_loss:
                self._fail("it was broken off, and could have been told why")
            # One that ended badly in a format that cannot say so is broken off too.
            over = any(not state.exists or state.over(self.wish.run) for state in states)
            if not (self.wish.kind == "proxied" and over) and not self._may_be_lost(states):
                self._fail("it was broken off, and nothing was lost")
        elif self.bye == "ended" or (self.wish.kind == "proxied" and not self.bye):
            unknown = any(not state.exists or self.wish.run not in state.runs for state in states)
            done = any(self._nothing_left(state) for state in states)
            if not done and not (self.wish.run is not None and unknown):
                self._fail("it is said to be over, and there is more to come")
        elif self.bye == "deleted":
            if all(state.exists for state in states):
                self._fail("it is said to be deleted, and was not")
        elif self.wish.control == "events" and self.bye not in ("drain", "rotate", "slow", "busy"):
            self._fail(f"it was let go with {self.bye!r}")

    def _may_be_lost(self, states: list[State]) -> bool:
        """Whether anything was trimmed or rewound that might have been this client's."""
        history = self.stream.states[self.since :]
        return (
            any(not state.exists for state in states)
            or len({state.earliest for state in states}) > 1
            or _rewound(history)
            or (self.position is not None and any(self._is_lost(state) for state in states))
        )

    # Around a failover

    def has_everything_of(self, stream: Stream) -> bool:
        """Whether it is connected and was shown all there is."""
        position, state = self.position, self.stream.now
        if self.stream is not stream or position is None or not self.connected or self.gone:
            return False
        return position.within(state) and not state.remains(self.shown, position.seq)

    def check_untold(self, so_far: int) -> None:
        """It was not told of any loss since its log was so long."""
        for entry in self.log[so_far:]:
            if entry.startswith(("gap", "reset")) or entry.endswith("broken off True"):
                self._fail(f"nothing was lost, and it heard: {entry}")

    # At quiescence

    @property
    def is_ahead(self) -> bool:
        """Whether it has more than the journal."""
        return self.position is not None and self.position.seq > self.stream.now.top

    def check_served(self) -> None:
        """Everything has been said and done: whoever is connected has everything, or has been let go."""
        state = self.stream.now
        if not self.connected or self.gone:
            return
        if self.status != 200:
            self._fail("it has no answer")
        if not state.exists:
            self._fail("the stream is gone, and it was not told")
        if state.over(self.wish.run) and not self.raced:
            self._fail("nothing more can come, and it still waits")
        position = self.position
        if position is None:
            starts = self._starts()
            if starts and all(state.remains(self.shown, start.seq) for start in starts):
                self._fail("it got nothing")
            return
        if not position.within(state):
            blind = any(position.unverifiable(state) for state in self._states())
            if not blind:
                self._fail("the stream does not go on from its position, and it was not told")
        if state.remains(self.shown, max(position.seq, state.earliest - 1)) or (
            position.seq < state.earliest - 1 and state.remains(self.shown, position.seq)
        ):
            self._fail("it does not have everything")
        if self.wish.shows_control and self.live != 1:
            self._fail(f"it has caught up, and was told live {self.live} times")


def _at(node: Node) -> Position:
    return Position(node.id, node.seq, node)


def _rewound(history: list[State]) -> bool:
    """Whether a state took something back of the one before it, be it only a trim."""
    return any(
        later.earliest < earlier.earliest
        or (earlier.head is not None and not _at(earlier.head).within(later))
        for earlier, later in pairwise(history)
    )
