"""relay.errors: one drawn tree, each class with its code and status."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

from relay import errors
from relay.errors import BodyTooLarge, CallerError, RelayError, SequenceGap, StartupError


def tree(root: type[RelayError]) -> Iterator[type[RelayError]]:
    yield root
    for branch in root.__subclasses__():
        yield from tree(branch)


CLASSES = [cls for cls in tree(RelayError) if cls.__module__ == errors.__name__]
LEAVES = [cls for cls in CLASSES if not cls.__subclasses__()]


def drawn() -> dict[str, tuple[int, str]]:
    """Class name -> (depth in the drawing, the text after it)."""
    lines: dict[str, tuple[int, str]] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r" {4}([│├└─ ]*)(\w+)(.*)", line)
        if match is not None:
            lines[match[2]] = (len(match[1]) // 4, match[3].strip())
    return lines


def test_every_class_has_a_code_of_its_own():
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all("code" in vars(cls) for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_code_is_a_stable_word_and_a_title_a_phrase(cls):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code)
    assert "title" in vars(cls)
    assert cls.title[0].isupper() or cls.title.startswith("relay ")
    assert not cls.title.endswith(".")


def test_the_drawing_shows_every_class_and_nothing_else():
    members = inspect.getmembers(errors, inspect.isclass)
    defined = {name for name, member in members if issubclass(member, Exception)}
    assert set(drawn()) == defined == {cls.__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_the_drawing_shows_each_class_below_its_base(cls):
    names = list(drawn())
    depth = drawn()[cls.__name__][0]
    assert depth == len(cls.__mro__) - len(RelayError.__mro__)
    if depth:
        above = [name for name in names[: names.index(cls.__name__)] if drawn()[name][0] == depth - 1]
        assert above[-1] == cls.__base__.__name__


@pytest.mark.parametrize("cls", [cls for cls in LEAVES if cls is not StartupError])
def test_the_drawing_gives_each_status_and_code(cls):
    assert re.match(rf"{cls.status} {cls.code}(:|$)", drawn()[cls.__name__][1])


@pytest.mark.parametrize("cls", CLASSES)
def test_a_status_tells_whose_fault_it_is(cls):
    if issubclass(cls, CallerError):
        assert 400 <= cls.status < 500 or cls is errors.UpgradeUnsupported
    elif issubclass(cls, errors.UpstreamError):
        assert cls.status in (502, 504)
    elif issubclass(cls, errors.JournalError | errors.Busy):
        assert cls.status == 503 or cls is errors.TooManyRequests
    else:
        assert cls.status == 500


def test_a_problem_document_has_title_status_code_and_detail():
    """RFC 9457 section 3, with a `code` member of ours."""
    assert BodyTooLarge("At most 5 bytes.").problem() == {
        "title": "Body too large",
        "status": 413,
        "code": "body_too_large",
        "detail": "At most 5 bytes.",
    }


def test_a_problem_document_carries_further_members():
    assert SequenceGap("A hole.", expected=7).problem()["expected"] == 7


def test_a_problem_without_a_detail_leaves_it_out():
    assert "detail" not in BodyTooLarge().problem()


def test_an_error_as_text_is_its_detail_or_else_its_title():
    assert str(BodyTooLarge("At most 5 bytes.")) == "At most 5 bytes."
    assert str(BodyTooLarge()) == "Body too large"
