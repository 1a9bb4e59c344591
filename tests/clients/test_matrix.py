"""The matrix of docs/clients.md: each real client in each column, one test a column."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from raw_client import RawClient
from recorded_answers import LANGGRAPH, OPENAI_RESPONSES, RAW
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import ScriptedUpstream
from tcp_proxy import TcpProxy

from clients.agent import Agent
from clients.matrix import ROWS
from clients.notes import WHOLE, Client, Kit, Wish
from relay.dialects.detect import BY_NAME


def each_client(column: str, wanted: Callable[[Client], bool] = lambda client: True) -> pytest.MarkDecorator:
    """The clients that are tried in a column."""
    clients = [
        pytest.param(client, id=name)
        for row in ROWS
        if column not in row.cannot
        for name, client in row.clients.items()
        if wanted(client)
    ]
    return pytest.mark.parametrize("client", clients)


one_journal = pytest.mark.parametrize("journal_url", ["redis"], indirect=True)


@pytest.fixture
def agent(upstream: ScriptedUpstream, name: str, client: Client) -> Agent:
    return Agent(upstream, name, client.answer)


@each_client("plain")
def test_a_plain_answer_is_shown_once_and_known_to_be_whole(
    beating: RelayProcess, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    agent.say(client.answer.events)
    notes = client.ask(kit, Wish(beating.url, name))
    assert notes.await_end() == WHOLE
    assert notes.text == "Hello"
    assert agent.calls == 1
    assert whole_run(beating, name).outcome == ("completed", "upstream_end")


@each_client("cut and resume")
def test_a_client_that_was_cut_in_mid_answer_comes_back_to_it(
    beating: RelayProcess, upstream: ScriptedUpstream, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    gate = upstream.gate()
    agent.say(client.answer.events, gate)
    with TcpProxy.running(beating.port) as proxy:
        wish = Wish(proxy.url, name)
        notes = client.ask(kit, wish)
        notes.await_text("Hel")
        proxy.cut_all()
        back = client.come_back(kit, wish, notes)
        back.await_text("Hel")
        gate.open()
        assert back.await_end() == WHOLE
        assert back.text == "Hello"
    assert agent.calls == 1
    assert whole_run(beating, name).outcome == ("completed", "upstream_end")


@one_journal
@each_client("cut and resume", lambda client: client.answer in (RAW, LANGGRAPH))
def test_a_client_that_was_cut_behind_the_last_event_finds_that_it_has_all(
    beating: RelayProcess, upstream: ScriptedUpstream, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    """These formats have no last word that everybody sends: the end of the answer is the end."""
    gate = upstream.gate()
    events = client.answer.events[: client.answer.shown + 1]
    agent.say(events, gate, at=len(events))
    with TcpProxy.running(beating.port) as proxy:
        notes = client.ask(kit, Wish(proxy.url, name))
        notes.await_text("Hello")
        proxy.refusing = True
        proxy.cut_all()
        gate.open()
        assert whole_run(beating, name).outcome == ("completed", "upstream_end")
        proxy.refusing = False
        assert notes.await_end() == WHOLE
    assert notes.text == "Hello"
    assert agent.calls == 1


@one_journal
@each_client("cancel")
def test_a_cancel_by_somebody_else_is_an_error_to_the_client_and_keeps_the_text(
    beating: RelayProcess, upstream: ScriptedUpstream, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    gate = upstream.gate()
    agent.say(client.answer.events, gate)
    notes = client.ask(kit, Wish(beating.url, name))
    notes.await_text("Hel")
    with RawClient(beating.port) as another:
        another.request("POST", f"/relay/v1/streams/{name}/cancel", "Content-Length: 0")
        assert another.answer().status == 200
    ending = notes.await_end()
    gate.open()
    assert ending.startswith(f"error: {client.raises}")
    assert not client.tells or "client_cancel" in ending
    assert notes.text == "Hel"
    record = whole_run(beating, name)
    assert record.outcome == ("cancelled", "client_cancel")
    run = record.ended["run"]
    assert beating.json(f"/relay/v1/streams/{name}/runs/{run}/transcript")["text"] == "Hel"


@one_journal
@each_client("truncation")
def test_an_upstream_that_breaks_off_is_an_error_to_the_client(
    beating: RelayProcess, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    expect_truncation(beating, kit, agent, name, client, broken=True)


@one_journal
@each_client("truncation", lambda client: BY_NAME[client.answer.dialect].needs_terminal)
def test_an_upstream_that_ends_without_its_last_word_is_an_error_to_the_client(
    beating: RelayProcess, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    expect_truncation(beating, kit, agent, name, client, broken=False)


def expect_truncation(
    beating: RelayProcess, kit: Kit, agent: Agent, name: str, client: Client, *, broken: bool
) -> None:
    """The client shows what came before, and says that it is not all."""
    agent.say(client.answer.events[: client.answer.shown], broken=broken)
    notes = client.ask(kit, Wish(beating.url, name))
    ending = notes.await_end()
    record = whole_run(beating, name)
    assert ending.startswith(f"error: {client.raises}")
    assert not client.tells or record.ended["error"] in ending
    assert notes.text == "Hel"
    assert record.outcome == ("failed", "upstream_truncated")


@one_journal
@each_client("plain", lambda client: bool(client.answer.error))
def test_an_error_of_upstreams_own_reaches_the_client_as_upstream_sent_it(
    beating: RelayProcess, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    error = client.answer.error
    if client.answer is OPENAI_RESPONSES:  # as the API sends it, and the SDKs look for it
        error = b'event: error\ndata: {"type":"error","error":{"message":"boom","code":"x"}}\n\n'
    agent.say([*client.answer.events[: client.answer.shown], error])
    notes = client.ask(kit, Wish(beating.url, name))
    ending = notes.await_end()
    assert ending.startswith(f"error: {client.raises}")
    assert "boom" in ending
    assert notes.text == "Hel"
    assert whole_run(beating, name).outcome == ("failed", "upstream_error")


@one_journal
@each_client("late join")
def test_a_client_that_comes_late_gets_all_from_the_start_and_goes_on_live(
    beating: RelayProcess, upstream: ScriptedUpstream, kit: Kit, agent: Agent, name: str, client: Client
) -> None:
    gate = upstream.gate()
    agent.say(client.answer.events, gate)
    first = client.ask(kit, Wish(beating.url, name))
    first.await_text("Hel")
    second = client.join(kit, Wish(beating.url, name))
    second.await_text("Hel")
    gate.open()
    for notes in (first, second):
        assert notes.await_end() == WHOLE
        assert notes.text == "Hello"
    assert agent.calls == 1
