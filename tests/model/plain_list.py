"""The model: what a stream should hold, as a plain list that remembers where it was rewound.

Every frame ever journaled is a node that knows the one before it, so a stream and all its former lives and
forks are one tree, and a journal's state is the path from its head to the root. A reader was served rightly
if each frame it got leads back to the one it had before, past nothing that it should have been shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from relay.frame import CONTROL_EVENT, Event, Frame
from relay.journal.base import Opened
from relay.lifecycle import Ending
from relay.limits import Retention

KEEP_ALL = Retention(0, 0, 0)
UNTOLD_MS = -1
TEXT_BYTES = 3
"""What each of a producer's frames says it shows."""


class Said(NamedTuple):
    """What the journal should say next: control frames as an object, others as they are."""

    run: str
    event: str
    data: bytes | dict[str, Any]


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

    @property
    def is_terminal(self) -> bool:
        return self.is_control and self.data.startswith(b'{"type":"run.ended"')

    def __repr__(self) -> str:
        return f"<{self.id} {self.run} {self.event or '-'} {self.data[:20]!r}>"


@dataclass(frozen=True)
class ModelRun:
    """A run. `events` are its producer's frames; `ended` is how it ended, `batch` what was last appended;
    `former` are writers that were fenced; `opened` is what its opening came to."""

    name: str
    writer: str
    token: str
    start: Node | None
    last: Node
    owner: str = ""
    dialect: str = ""
    seals: bool = False
    opened: Opened | None = None
    events: tuple[Event, ...] = ()
    ended: Ending | None = None
    batch: tuple[int, tuple[Event, ...], Ending | None] = (1, (), None)
    former: tuple[str, ...] = ()
    superseded_by: str = ""

    @property
    def next_seq(self) -> int:
        return len(self.events) + 1

    @property
    def text_bytes(self) -> int:
        return TEXT_BYTES * len(self.events)


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

    def latest(self) -> str:
        """The newest run, open or not."""
        return next(reversed(self.runs), "")

    def others_since(self, first: ModelRun, but: Collection[str]) -> list[str]:
        """Whose each frame is that stands at or after the start of a run, those of some runs left out."""
        start = first.start.seq if first.start else 0
        return [node.run for node in self.path() if node.seq > start and node.run not in but]

    def broken_promise(self) -> str:
        """Which promise about runs the frames break, in one sentence; empty if none."""
        frames: dict[str, list[Node]] = {name: [] for name in self.runs}
        for node in self.path():
            frames[node.run].insert(0, node)
        for name, run in self.runs.items():
            endings = [node for node in frames[name] if node.is_terminal]
            if len(endings) != (run.ended is not None):
                return f"P3: {name} has {len(endings)} endings"
            if endings and frames[name][-1] is not endings[0]:
                return f"P4: {name} goes on after its ending: {frames[name]}"
            said = [Event(node.event, node.data) for node in frames[name] if not node.is_control]
            if tuple(said[: len(run.events)]) != run.events or len(said) > len(run.events) + bool(endings):
                return f"P5: {name} was told {run.events} and says {said}"
            if frames[name][-1] is not run.last:
                return f"{name} ends with {frames[name][-1]}, not {run.last}"
        return ""

    def remains(self, shown: Shown, after_seq: int) -> bool:
        """Whether there is anything to show after a position, be it trimmed or not."""
        return any(shown(node) for node in self.path() if node.seq > after_seq)

    # What producers do

    def went_on(self, head: Node | None, *runs: ModelRun, sealed: bool = False) -> State:
        """The state after these runs became what they are now, and the newest frame `head`."""
        changed = {run.name: run for run in runs}
        return replace(self, head=head, runs=self.runs | changed, sealed=self.sealed or sealed).retained()

    def trimmed(self, before_seq: int) -> State:
        """The state after a trim."""
        return replace(self, earliest=max(self.earliest, min(before_seq, self.top + 1)))

    def retained(self) -> State:
        """What the bounds leave; the newest frame always stays."""
        held = self.held()
        if not held:
            return self
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


class Farewell(Node):
    """The ending of a run that was open when its stream was deleted. It can be heard and never read, so that
    only a hint says its time."""

    def told(self, ms: int) -> None:
        object.__setattr__(self, "ms", ms)


class Stream:
    """Everything that ever happened to one stream: its states in order, and every frame by its id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.states = [State()]
        self.nodes: dict[str, Node] = {}
        self.lives = 0
        self.farewells: list[Farewell] = []
        self.broken = False
        """Whether a promise was broken here: what follows has no meaning."""

    @property
    def now(self) -> State:
        return self.states[-1]

    def become(self, state: State) -> None:
        """The journal has changed."""
        self.states.append(state)

    def hear(self, frame: Frame) -> None:
        """A hint told of a frame: it may be one of those that nobody can read."""
        for node in self.farewells:
            if node.ms == UNTOLD_MS and (node.seq, node.run, node.data) == (frame.seq, frame.run, frame.data):
                node.told(frame.ms)
                self.nodes[node.id] = node

    def add(self, previous: Node | None, ms: int, run: str, event: str, data: bytes) -> Node:
        """A frame was journaled."""
        node = Node(previous, previous.seq + 1 if previous else 1, ms, run, event, data)
        assert previous is None or ms >= previous.ms, "the journal's clock went back within a stream"
        assert node.id not in self.nodes, f"the id {node.id} was given out twice"
        self.nodes[node.id] = node
        return node
