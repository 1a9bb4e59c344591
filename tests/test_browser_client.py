"""The browser client's files, as relay serves them."""

from __future__ import annotations

import pytest
from relay_process import RelayProcess

from relay.browser_client import STATIC


@pytest.mark.parametrize(
    ("name", "media_type"),
    [("relay-stream.js", "text/javascript"), ("relay-stream.d.ts", "application/typescript")],
)
def test_the_browser_client_is_served_as_it_is_published_and_a_copy_is_not_sent_twice(
    relay: RelayProcess, name: str, media_type: str
) -> None:
    status, headers, body = relay.get(f"/relay/static/{name}")
    assert (status, headers["content-type"].partition(";")[0]) == (200, media_type)
    assert body == (STATIC / name).read_bytes()
    status, _, body = relay.get(f"/relay/static/{name}", If_None_Match=headers["etag"])
    assert (status, body) == (304, b"")
    assert relay.get(f"/relay/static/{name}", If_None_Match='"another"')[0] == 200


def test_nothing_else_of_that_folder_is_served(relay: RelayProcess) -> None:
    assert relay.get("/relay/static/package.json")[0] == 404
    assert relay.get("/relay/static/../api.py")[0] == 404
