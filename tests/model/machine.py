"""What can happen, in any order: the rules of the model test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from model.backends import Backend
from model.client import Wish
from model.plain_list import Stream
from model.world import World

from relay.frame import Event
from relay.lifecycle import Reason, ending
from relay.limits import Retention

T = TypeVar("T")

CLIENTS_MAX = 7
STREAMS = st.integers(0, 1)
# Mostly one run, so that what happens to it is deep.
RUNS = st.sampled_from(("r0", "r0", "r1", "r2"))
PICK = st.integers(0, 99)
FATES = st.sampled_from(("deliver", "shuffle", "double", "some", "lose"))
TEXTS = st.sampled_from(
    (b"a", b"b", b"c", b"", b"x\ny\r\n", "é€🙂".encode(), b'{"type":"run.ended"}', b"large")
)
LARGE = b"l" * 70_000  # not in the strategy, so that a failing example can be printed
EVENTS = st.lists(st.builds(Event, st.sampled_from(("", "delta", "live")), TEXTS), min_size=1, max_size=5)
LAST_EVENTS = st.lists(st.just(Event("", b"z")), max_size=2)
ENDINGS = st.sampled_from(
    (
        None,
        None,
        None,
        ending(Reason.PRODUCER_END),
        ending(Reason.UPSTREAM_ERROR, "it broke"),
        ending(Reason.CLIENT_CANCEL),
    )
)
RETENTIONS = st.sampled_from((Retention(), Retention(), Retention(5), Retention(0, 400)))
WISHES = st.builds(
    Wish,
    st.sampled_from(("events", "events", "events", "envelope", "ndjson", "json")),
    st.sampled_from(("events", "events", "comments", "none")),
    st.sampled_from((None, None, "r0", "r0", "r1", "current")),
    st.sampled_from(("start", "start", "start", "tail")),
)
RARELY = st.sampled_from((True, *(False,) * 5))
HOLDERS = st.tuples(st.sampled_from(("", "p1", "p2")), st.sampled_from(("", "wordy")))
IF_BUSY = st.sampled_from(("allow", "allow", "allow", "supersede", "reject"))
OLD = st.lists(st.sampled_from(("latest", "latest", 0, 0, 0, 1, 2, "nobody")), max_size=3)
"""Runs to supersede: the newest, one by its number, or one that is not there."""


def pick(items: list[T], number: int) -> T:
    """One of a list."""
    return items[number % len(items)]


def _fresh(stream: Stream) -> str:
    """The name of a run that is not there."""
    return next(name for name in map("r{}".format, range(999)) if name not in stream.now.runs)


def _enlarged(events: list[Event]) -> list[Event]:
    return [event._replace(data=LARGE) if event.data == b"large" else event for event in events]


BATCHES = st.lists(EVENTS, min_size=1, max_size=4)
HURRY = st.booleans()  # without rest, the next thing happens in the midst of what this one set off

# What a step takes, and how often it is taken. All steps are one rule, because of several rules some are left
# out of an example, and it takes nearly all of these together to come to the interesting places.
STEPS: dict[str, tuple[int, st.SearchStrategy[tuple[Any, ...]]]] = {
    "append": (7, st.tuples(PICK, BATCHES, HURRY)),
    "append_with_repeats": (2, st.tuples(PICK, EVENTS, st.integers(0, 4), ENDINGS, st.booleans(), HURRY)),
    "end_run": (4, st.tuples(PICK, LAST_EVENTS, ENDINGS, st.booleans(), HURRY)),
    "open_run": (3, st.tuples(STREAMS, RUNS, RARELY, RETENTIONS, HOLDERS, st.booleans(), HURRY)),
    "supersede": (5, st.tuples(STREAMS, OLD, IF_BUSY, RARELY, HOLDERS, st.booleans(), HURRY)),
    "cancel": (3, st.tuples(PICK, st.booleans(), st.booleans(), HURRY)),
    "take_over": (3, st.tuples(PICK, st.booleans(), HURRY)),
    "kill_owner": (2, st.tuples(st.sampled_from(("p1", "p2")), HURRY)),
    "seal": (2, st.tuples(STREAMS, RARELY, HURRY)),
    "append_unnumbered": (1, st.tuples(PICK, EVENTS, ENDINGS, HURRY)),
    "repeat": (2, st.tuples(PICK, st.booleans())),
    "trim": (3, st.tuples(STREAMS, st.integers(-1, 6), HURRY)),
    "delete": (1, st.tuples(STREAMS, HURRY)),
    "save": (3, st.tuples(STREAMS)),
    "rewind": (1, st.tuples(PICK, st.booleans(), HURRY)),
    "fork": (4, st.tuples(PICK, st.sampled_from(("rewind", "rewind", "rewind", "recreate")), BATCHES, HURRY)),
    "fail_over": (4, st.tuples(PICK, BATCHES, ENDINGS, st.booleans(), HURRY)),
    "restart": (2, st.tuples(st.booleans())),
    "break_something": (4, st.tuples(st.sampled_from(("hints", "reads", "failures")), st.integers(1, 3))),
    "doubt": (3, st.tuples(STREAMS, st.booleans())),
    "release_hints": (2, st.tuples(FATES, st.booleans(), HURRY)),
    "release_reads": (3, st.tuples(st.integers(1, 3), st.booleans(), HURRY)),
    "come": (4, st.tuples(STREAMS, WISHES, HURRY)),
    "come_by_token": (1, st.tuples(PICK, HURRY)),
    "come_back": (4, st.tuples(PICK, st.booleans(), HURRY)),
    "disturb": (
        5,
        st.tuples(
            PICK,
            st.sampled_from(("leave", "cut", "cut", "stall", "stall", "go on")),
            st.sampled_from((1, 30, 150, 400, 2000)),
            HURRY,
        ),
    ),
    "pass_time": (2, st.tuples(st.sampled_from((0.3, 0.3, 2.5, 6.0, 20.0, 9000.0)), st.booleans())),
    "quiesce": (2, st.tuples(FATES)),
}
STEP = st.sampled_from([name for name, (weight, _) in STEPS.items() for _ in range(weight)]).flatmap(
    lambda name: st.tuples(st.just(name), STEPS[name][1])
)


class Machine(RuleBasedStateMachine):
    """Subclassed for each journal."""

    make_backend: ClassVar[Callable[[], Backend]]

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(
        pages=st.sampled_from((1, 2, 3, 1000)),
        ring=st.sampled_from((3, 6, 4096)),
        grace=st.sampled_from((0.0, 5.0, 5.0)),
        company=st.sampled_from((0, 0, 1, 2)),
        retention=RETENTIONS,
        wishes=st.tuples(WISHES, WISHES),
        seed=PICK,
    )
    def begin(
        self,
        pages: int,
        ring: int,
        grace: float,
        company: int,
        retention: Retention,
        wishes: tuple[Wish, Wish],
        seed: int,
    ) -> None:
        self.world = World(type(self).make_backend(), pages, ring, grace, seed)
        for stream in self.the.streams:
            for number in range(company + 1):
                seals = number == company and seed % 6 == 0
                self.the.open_run(stream, f"r{number}", seal=seals, retention=retention)
        for wish in wishes:
            self.the.add_client(self.the.streams[0], wish)
        self.the.settle()

    @rule(step=STEP)
    def do(self, step: tuple[str, tuple[Any, ...]]) -> None:
        name, arguments = step
        getattr(self, name)(*arguments)

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            if not any(stream.broken for stream in self.world.streams):
                self._end_well()
        finally:
            self.world.close()

    def _end_well(self) -> None:
        """Everybody comes back once more and gets everything."""
        self.the.quiesce("lose")
        for _ in range(2):  # who was told 410 begins anew
            for client in list(self.the.gone_clients()):
                self.the.connect(client)
            self.the.quiesce("deliver")

    @property
    def the(self) -> World:
        assert self.world is not None
        return self.world

    def _after(self, hurry: bool) -> None:
        if not hurry:
            self.the.settle()

    # Producers

    def open_run(
        self,
        stream: int,
        run: str,
        seal: bool,
        retention: Retention,
        holder: tuple[str, str],
        unheard: bool,
        hurry: bool,
    ) -> None:
        owner, dialect = holder
        self.the.open_run(
            self.the.streams[stream],
            run,
            seal=seal,
            retention=retention,
            owner=owner,
            dialect=dialect,
            unheard=unheard,
        )
        self._after(hurry)

    def supersede(
        self,
        stream: int,
        old: list[str | int],
        if_busy: str,
        seal: bool,
        holder: tuple[str, str],
        unheard: bool,
        hurry: bool,
    ) -> None:
        """A new run in the place of others."""
        one = self.the.streams[stream]
        owner, dialect = holder
        names = list(one.now.runs)
        self.the.open_run(
            one,
            _fresh(one),
            seal=seal,
            owner=owner,
            dialect=dialect,
            supersedes=[which if isinstance(which, str) else pick(names, which) for which in old if names],
            if_busy=if_busy,
            unheard=unheard,
        )
        self._after(hurry)

    def _append(
        self,
        which: int,
        events: list[Event],
        repeat: int,
        ended: Any,
        open_only: bool,
        unheard: bool = False,
        error: bool = False,
    ) -> None:
        runs = self._runs(open_only=open_only)
        if runs:
            stream, run = pick(runs, which)
            self.the.append(stream, run, _enlarged(events), repeat, ended, unheard=unheard, error=error)
        else:
            self._go_on(self.the.streams[which % 2], which, events)

    def _runs(self, *, open_only: bool = False) -> list[tuple[Stream, str]]:
        return [
            (stream, name)
            for stream in self.the.streams
            for name, run in stream.now.runs.items()
            if run.ended is None or not open_only
        ]

    def append(self, which: int, batches: list[list[Event]], hurry: bool) -> None:
        for events in batches:
            self._append(which, events, 0, None, True)
        self._after(hurry)

    def append_with_repeats(
        self, which: int, events: list[Event], repeat: int, ended: Any, unheard: bool, hurry: bool
    ) -> None:
        self._append(which, events, repeat, ended, True, unheard)
        self._after(hurry)

    def append_unnumbered(self, which: int, events: list[Event], ended: Any, hurry: bool) -> None:
        runs = self._runs()
        if runs:
            self.the.append_unnumbered(*pick(runs, which), _enlarged(events), ended)
        self._after(hurry)

    def end_run(self, which: int, events: list[Event], ended: Any, error: bool, hurry: bool) -> None:
        self._append(which, events, 0, ended, open_only=which % 4 != 0, error=error)
        self._after(hurry)

    def cancel(self, which: int, as_owner: bool, unheard: bool, hurry: bool) -> None:
        runs = self._runs(open_only=which % 4 != 0)
        if runs:
            stream, name = pick(runs, which)
            owner = "p1" if as_owner else ""
            self.the.end_run(stream, name, ending(Reason.CLIENT_CANCEL), owner, unheard=unheard)
        self._after(hurry)

    def take_over(self, which: int, unheard: bool, hurry: bool) -> None:
        """The former writer finds out in `repeat`."""
        runs = self._runs(open_only=which % 4 != 0)
        if runs:
            self.the.take_over(*pick(runs, which), unheard=unheard)
        self._after(hurry)

    def kill_owner(self, owner: str, hurry: bool) -> None:
        self.the.kill_owner(owner)
        self._after(hurry)

    def seal(self, stream: int, while_open: bool, hurry: bool) -> None:
        one = self.the.streams[stream]
        if while_open or not one.now.open_runs():
            self.the.seal(one)
        self._after(hurry)

    def repeat(self, which: int, misbehave: bool) -> None:
        runs = self._runs()
        if runs and misbehave:
            self.the.misbehave(*pick(runs, which))
        elif runs:
            self.the.repeat(*pick(runs, which))
        self.the.settle()

    # Operators

    def trim(self, stream: int, back: int, hurry: bool) -> None:
        one = self.the.streams[stream]
        if one.now.exists:
            self.the.trim(one, one.now.top - back)
        self._after(hurry)

    def delete(self, stream: int, hurry: bool) -> None:
        self.the.delete(self.the.streams[stream])
        self._after(hurry)

    def save(self, stream: int) -> None:
        self.the.save(self.the.streams[stream])

    def rewind(self, which: int, live: bool, hurry: bool) -> None:
        if self.the.saved:
            self.the.rewind(which, live=live)
        self._after(hurry)

    def fail_over(
        self, which: int, batches: list[list[Event]], ended: Any, slowly: bool, hurry: bool
    ) -> None:
        """The journal loses what was said just now, or longer ago, and gets it back."""
        stream = self.the.streams[which % 2]
        if which % 3:
            self.the.save(stream)
            for events in batches:
                self._go_on(stream, which, events)
            if ended and stream.now.open_runs():
                self.the.append(stream, stream.now.open_runs()[0], [], 0, ended, error=which % 5 == 0)
            which = -1
        self.the.fail_over(which, slowly=slowly)
        self._after(hurry)

    def fork(self, which: int, way: str, batches: list[list[Event]], hurry: bool) -> None:
        """The journal forgets and goes on otherwise. What it says of it is lost until it is where it was, so
        that what is heard next seems to follow: the seq is right and only the ms is not."""
        saved = self.the.saved
        if way == "rewind" and not saved:
            self.the.save(self.the.streams[which % 2])
        if way == "rewind":
            stream = saved[which % len(saved)][0] or self.the.streams[which % 2]
            top = stream.now.top
            self.the.rewind(which, live=True)
            self.the.deafen()
        else:
            stream = self.the.streams[which % 2]
            top = stream.now.top
            self.the.deafen()
            self.the.delete(stream)
        self._go_on(stream, which, [])
        for _ in range(min(12, top - stream.now.top)):
            self._go_on(stream, which, [Event("", b"f")])
        self.the.settle()
        self.the.hear_again()
        for events in batches:
            self._go_on(stream, which, events)
        if which % 3 == 0 and stream.now.open_runs():
            self.the.append(stream, stream.now.open_runs()[0], [], 0, ending(Reason.PRODUCER_END))
        self._after(hurry)

    def _go_on(self, stream: Stream, which: int, events: list[Event]) -> None:
        """Append to an open run, or open one."""
        runs = stream.now.open_runs()
        if not runs and not (stream.now.exists and stream.now.sealed):
            self.the.open_run(stream, _fresh(stream), seal=which % 6 == 0)
        elif runs and events:
            self.the.append(stream, pick(runs, which), events, 0, None)

    def restart(self, graceful: bool) -> None:
        self.the.restart(graceful=graceful)

    # Faults

    def break_something(self, fault: str, count: int) -> None:
        journal = self.the.journal
        if fault == "hints":
            journal.holds_hints = True
        elif fault == "reads":
            journal.holds_reads = True
        else:
            self.the.fail_reads(count)

    def doubt(self, stream: int, slowly: bool) -> None:
        """The journal's link was broken and is up again. Reading it takes long enough for much to happen."""
        self.the.journal.holds_reads = self.the.journal.holds_reads or slowly
        self.the.inside(lambda: self.the.app.tails.on_doubt(self.the.streams[stream].name))
        self.the.settle()

    def release_hints(self, fate: str, go_on: bool, hurry: bool) -> None:
        self.the.journal.holds_hints = self.the.journal.holds_hints and not go_on
        self.the.release_hints(fate)
        self._after(hurry)

    def release_reads(self, count: int, go_on: bool, hurry: bool) -> None:
        self.the.journal.holds_reads = self.the.journal.holds_reads and not go_on
        self.the.journal.release_reads(99 if go_on else count, self.the.choice)
        self._after(hurry)

    # Clients

    def come(self, stream: int, wish: Wish, hurry: bool) -> None:
        if len(self.the.clients) < CLIENTS_MAX:
            self.the.add_client(self.the.streams[stream], wish)
        self._after(hurry)

    def come_by_token(self, which: int, hurry: bool) -> None:
        runs = self._runs()
        if runs and len(self.the.clients) < CLIENTS_MAX:
            stream, name = pick(runs, which)
            wish = Wish("proxied", "none", name, "start")
            self.the.add_client(stream, wish, stream.now.runs[name].token)
        self._after(hurry)

    def come_back(self, which: int, everybody: bool, hurry: bool) -> None:
        gone = list(self.the.gone_clients())
        for client in gone if everybody or not gone else [pick(gone, which)]:
            self.the.connect(client)
        self._after(hurry)

    def disturb(self, which: int, what: str, after_bytes: int, hurry: bool) -> None:
        client = pick(self.the.clients, which)
        if client.connected and not client.gone:
            if what == "leave":
                self.the.inside(client.leave)
            elif what == "cut":
                client.cut_after = after_bytes
            elif what == "stall":
                client.stall()
            else:
                client.go_on()
        self._after(hurry)

    # Time

    def pass_time(self, seconds: float, care: bool) -> None:
        self.the.pass_time(seconds)
        if care:
            self.the.visit_readers()
            self.the.check_quiet()

    def quiesce(self, fate: str) -> None:
        self.the.quiesce(fate)
