"""AG-UI's own types for Python take what the matrix is told, and what relay adds to it."""

from __future__ import annotations

import json
from typing import Any

from ag_ui.core import Event
from pydantic import TypeAdapter
from recorded_answers import AG_UI

from relay.dialects.detect import BY_NAME
from relay.lifecycle import Reason, ending


def test_the_types_of_ag_ui_take_the_error_event_and_the_recorded_answer() -> None:
    said = BY_NAME["ag-ui"].error_event(ending(Reason.UPSTREAM_TRUNCATED))
    assert said is not None
    sent = [json.loads(event.removeprefix(b"data: ")) for event in AG_UI.events]
    events: TypeAdapter[Any] = TypeAdapter(Event)
    kinds = [events.validate_python(payload).type for payload in [*sent, json.loads(said.data)]]
    assert kinds == [payload["type"] for payload in sent] + ["RUN_ERROR"]
