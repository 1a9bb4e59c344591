"""relay.settings: every setting once, with a flag, a variable, a default and a meaning."""

from __future__ import annotations

import dataclasses
import math

import pytest

from relay.errors import StartupError
from relay.limits import RETENTION_MAX_S, Retention
from relay.settings import NUMBER_MAX, Settings

NUMBERS = [
    field.name
    for field in dataclasses.fields(Settings)
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_setting_says_what_it_means(field: dataclasses.Field[object]) -> None:
    assert field.metadata["help"].endswith((".", "path."))
    if isinstance(field.default, float):
        assert field.name.endswith(("_s", "_ms")), "a duration has its unit in its name"


def test_a_stream_keeps_what_the_settings_say() -> None:
    assert Settings().retention == Retention()
    assert Settings(max_frames=1, max_bytes=2, retention_s=3).retention == Retention(1, 2, 3)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_number_that_nothing_can_work_with_is_refused_by_its_flag(name: str, value: float) -> None:
    with pytest.raises(StartupError, match=f"^--{name.replace('_', '-')} "):
        Settings(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_largest_one_that_every_journal_can_work_with(name: str) -> None:
    most = RETENTION_MAX_S if name.endswith("_s") else NUMBER_MAX
    assert getattr(Settings(**{name: most}), name) == most
    with pytest.raises(StartupError, match=f"and {most} at most"):
        Settings(**{name: most + 1})


@pytest.mark.parametrize("name", ["heartbeat_s", "write_timeout_s", "readers_max", "frame_max_bytes"])
def test_zero_is_refused_where_it_does_not_mean_none(name: str) -> None:
    with pytest.raises(StartupError, match="must be more than 0"):
        Settings(**{name: 0})


@pytest.mark.parametrize(
    "name", ["port", "max_frames", "abandon_s", "max_run_s", "group_ms", "drain_grace_s"]
)
def test_zero_is_taken_where_it_means_none(name: str) -> None:
    assert getattr(Settings(**{name: 0}), name) == 0
