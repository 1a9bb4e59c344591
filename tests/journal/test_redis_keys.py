"""Where a journal keeps what, so that another's keys are never taken for its own."""

from __future__ import annotations

from relay.journal.redis_keys import Keys, member_of, named_by

KEYS = Keys("relay", 3)


def test_all_keys_of_a_stream_share_its_hash_tag() -> None:
    of = KEYS.of("chat-1")
    keys = [*of[: of._fields.index("channel")], of.run("r")]
    assert all(key.startswith(b"relay:{chat-1}:") for key in keys)
    assert len(set(keys)) == len(keys)
    assert of.run("r") == b"relay:{chat-1}:run:r"
    assert KEYS.of("chat-1") is of, "made once"


def test_no_other_key_has_one() -> None:
    others = [
        KEYS.streams, KEYS.owners, KEYS.due, KEYS.ended, KEYS.deliveries,
        KEYS.owner("p"), KEYS.owned("p"), KEYS.token("t"), KEYS.claim("k"),
    ]  # fmt: skip
    assert all(key.startswith(b"relay:") and b"{" not in key for key in others)
    assert len(set(others)) == len(others)


def test_channels_are_of_one_database_because_redis_has_them_in_common() -> None:
    assert KEYS.of("s").channel == b"relay:3:follow:{s}"
    assert KEYS.owner_channel("p") == b"relay:3:owner:p"
    assert KEYS.owner_channel("") + b"p" == KEYS.owner_channel("p"), "scripts put the name behind it"


def test_prefixes_keep_journals_apart() -> None:
    other = Keys("other", 3)
    assert other.of("s").frames == b"other:{s}:frames"
    assert other.streams == b"other:streams"


def test_a_member_names_a_stream_and_a_run() -> None:
    assert named_by(member_of("chat-1", "r:1").encode()) == ("chat-1", "r:1")
