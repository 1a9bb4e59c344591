"""relay.progress: what is shown to who waits, and to nobody else."""

from __future__ import annotations

import io

import pytest

from relay.progress import EVERY_S, Progress, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def line(self) -> str:
        """What a person sees: what was written after the line was erased last."""
        return self.getvalue().rpartition("\r\x1b[K")[2]


def test_a_line_is_written_over_and_taken_away() -> None:
    terminal, clock = Terminal(), [0.0]
    progress = Progress(terminal, lambda: clock[0])
    progress.show("1 of 2")
    assert terminal.line == "1 of 2"
    clock[0] += EVERY_S
    progress.show("2 of 2")
    assert terminal.line == "2 of 2"
    progress.clear()
    assert terminal.line == ""
    assert "\n" not in terminal.getvalue()


def test_it_is_not_written_more_often_than_anybody_reads() -> None:
    terminal, clock = Terminal(), [0.0]
    progress = Progress(terminal, lambda: clock[0])
    for number in range(1000):
        progress.show(str(number))
        clock[0] += EVERY_S / 100
    assert terminal.getvalue().count("\r") == 10


def test_nothing_is_written_where_no_terminal_is() -> None:
    pipe = io.StringIO()
    progress = Progress(pipe)
    progress.show("1 of 2")
    progress.clear()
    assert pipe.getvalue() == ""


def test_a_terminal_on_which_nothing_was_shown_is_left_alone() -> None:
    terminal = Terminal()
    Progress(terminal).clear()
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**41, "2.0 TiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_a_size_is_told_in_a_unit_that_suits_it(count: int, text: str) -> None:
    assert size(count) == text
