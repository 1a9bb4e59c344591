"""The model: what a stream should hold, as a plain list that remembers where it was rewound.

Every frame ever journaled is a node that knows the one before it, so a stream and all its former lives and
forks are one tree, and a journal's state is the path from its head to the root. A reader was served rightly
if each frame it got leads back to the one it had before, past nothing that it should have been shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from relay.frame import CONTROL_EVENT, Event
from relay.lifecycle import Ending
from relay.limits import Retention

KEEP_ALL = Retention(0, 0, 0)


@dataclass(frozen=True, eq=False)
class Node:
    """One frame and what was before it; None before the first of a life."""

    previous: Node | None
    seq: int
    ms: int
    run: str
    event: str
    data: bytes

    @property
    def id(self) -> str:
        return f"{self.seq}-{self.ms}"

    @property
    def is_control(self) -> bool:
        return self.event == CONTROL_EVENT

    def __repr__(self) -> str:
        return f"<{self.id} {self.run} {self.event or '-'} {self.data[:20]!r}>"


@dataclass(frozen=True)
class ModelRun:
    """A run. `events` are its data frames; `ended` is how it ended, `batch` what was last appended."""

    name: str
    writer: str
    token: str
    start: Node | None
    last: Node
    events: tuple[Event, ...] = ()
    text_bytes: int = 0
    ended: Ending | None = None
    batch: tuple[int, tuple[Event, ...], Ending | None] = (1, (), None)


class Shown(NamedTuple):
    """What a reader is shown: frames of one run or of all, with control frames or without."""

    run: str | None
    control: bool

    def __call__(self, node: Node) -> bool:
        return (self.run is None or node.run == self.run) and (self.control or not node.is_control)


@dataclass(frozen=True)
class State:
    """A stream at one moment. `life` numbers the times it was created; 0: there is none."""

    life: int = 0
    head: Node | None = None
    earliest: int = 1
    runs: dict[str, ModelRun] = field(default_factory=dict)
    sealed: bool = False
    retention: Retention = KEEP_ALL

    @property
    def exists(self) -> bool:
        return self.life > 0

    @property
    def top(self) -> int:
        return self.head.seq if self.head else 0

    @property
    def created_ms(self) -> int:
        """When this life began: the time of its first frame."""
        return [node.ms for node in self.path()][-1]

    def path(self) -> Iterator[Node]:
        """Every frame of this life, newest first, trimmed ones too."""
        node = self.head
        while node is not None:
            yield node
            node = node.previous

    def held(self) -> list[Node]:
        """What the journal should hold, oldest first."""
        return [node for node in self.path() if node.seq >= self.earliest][::-1]

    def open_runs(self) -> list[str]:
        """Names, oldest first."""
        return [run.name for run in self.runs.values() if run.ended is None]

    def over(self, run: str | None) -> bool:
        """Whether nothing more can come, in one run or in the stream."""
        if run is None:
            return self.sealed and not self.open_runs()
        return run not in self.runs or self.runs[run].ended is not None

    def remains(self, shown: Shown, after_seq: int) -> bool:
        """Whether there is anything to show after a position, be it trimmed or not."""
        return any(shown(node) for node in self.path() if node.seq > after_seq)

    # What producers do

    def opened(self, life: int, run: ModelRun, sealed: bool, retention: Retention) -> State:
        """The state after a run was opened, `run.last` being its first frame."""
        if not self.exists:
            state = State(life, run.last, 1, {run.name: run}, sealed, retention)
        else:
            state = replace(self, head=run.last, runs=self.runs | {run.name: run})
        return state.retained()

    def appended(self, run: ModelRun) -> State:
        """The state after a run's appends up to `run.last`."""
        return replace(self, head=run.last, runs=self.runs | {run.name: run}).retained()

    def trimmed(self, before_seq: int) -> State:
        """The state after a trim."""
        return replace(self, earliest=max(self.earliest, min(before_seq, self.top + 1)))

    def retained(self) -> State:
        """What the bounds leave; the newest frame always stays."""
        held = self.held()
        size = sum(len(node.data) for node in held)
        max_frames, max_bytes = self.retention.max_frames, self.retention.max_bytes
        while len(held) > 1 and ((max_frames and len(held) > max_frames) or (max_bytes and size > max_bytes)):
            size -= len(held.pop(0).data)
        return replace(self, earliest=max(self.earliest, held[0].seq))


@dataclass(frozen=True)
class Position:
    """Where a client stands. `node` None: just before the frame `seq + 1`, whichever that is."""

    text: str
    seq: int
    node: Node | None = None

    @property
    def ms(self) -> int:
        return int(self.text.partition("-")[2] or 0)

    def within(self, state: State) -> bool:
        """Whether the state went on from here."""
        return self.node is None or any(node is self.node for node in state.path())

    def unverifiable(self, state: State) -> bool:
        """Whether the journal cannot tell that this is of another fork: the frame in its place is trimmed,
        and the one after it is not, so that nothing is seen to be missing."""
        return state.exists and self.seq == state.earliest - 1 and not self.is_before(state)

    def is_before(self, state: State) -> bool:
        """Whether this is of a time before the stream's life began, which is seen whatever is trimmed."""
        return state.exists and self.seq > 0 and self.ms < state.created_ms


BEFORE_FIRST = Position("0-0", 0)


def leads_on(position: Position, node: Node, shown: Shown) -> bool:
    """Whether `node` is what a reader at `position` gets next, or is after it with only unshown between."""
    at = node.previous
    while at is not None and at.seq > position.seq:
        if shown(at):
            return False
        at = at.previous
    return node.seq > position.seq and (position.node is None or at is position.node)


class Stream:
    """Everything that ever happened to one stream: its states in order, and every frame by its id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.states = [State()]
        self.nodes: dict[str, Node] = {}
        self.lives = 0
        self.broken = False
        """Whether a promise was broken here: what follows has no meaning."""

    @property
    def now(self) -> State:
        return self.states[-1]

    def become(self, state: State) -> None:
        """The journal has changed."""
        self.states.append(state)

    def add(self, previous: Node | None, ms: int, run: str, event: str, data: bytes) -> Node:
        """A frame was journaled."""
        node = Node(previous, previous.seq + 1 if previous else 1, ms, run, event, data)
        assert previous is None or ms >= previous.ms, "the journal's clock went back within a stream"
        assert node.id not in self.nodes, f"the id {node.id} was given out twice"
        self.nodes[node.id] = node
        return node
