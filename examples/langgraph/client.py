"""LangGraph's own SDK, which knows nothing of relay: only its URL is relay's.

python client.py QUESTION                  ask in a new thread
python client.py --thread T --run R ID     go on with an answer, behind the event ID
"""

import sys
from uuid import uuid4

from langgraph_sdk import get_sync_client

client = get_sync_client(url="http://127.0.0.1:8080")


def ask(thread: str, **question) -> str | None:
    """Show an answer; what the graph wants to know before it goes on, if it stopped for that."""
    wanted = None
    at = {"thread": thread}
    parts = client.runs.stream(
        thread,
        "agent",
        **question,
        if_not_exists="create",
        stream_mode=["messages-tuple", "values"],
        on_disconnect="cancel",  # relay leaves only when somebody stopped the run, or its time is over
    )
    try:
        for part in parts:
            at["event"] = part.id
            if part.event == "metadata":
                at["run"] = part.data["run_id"]
            elif part.event == "values" and part.data.get("__interrupt__"):
                wanted = part.data["__interrupt__"][0]["value"]
            show(part)
    except KeyboardInterrupt:
        print("\nGo on: python client.py --thread {thread} --run {run} {event}".format_map(at))
        sys.exit()
    print()
    return wanted


def go_on(thread: str, run: str, event: str) -> None:
    """Show the rest of an answer."""
    for part in client.runs.join_stream(thread, run, last_event_id=event):
        show(part)
    print()


def show(part) -> None:
    if part.event == "messages":
        print(part.data[0]["content"], end="", flush=True)
    elif part.event == "error":
        print("\n" + part.data["message"], end="")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--thread", thread, "--run", run, event]:
            go_on(thread, run, event)
        case [question]:
            thread = str(uuid4())
            print(f"thread {thread}")
            wanted = ask(thread, input={"messages": [{"role": "user", "content": question}]})
            while wanted:
                wanted = ask(thread, command={"resume": input(f"{wanted} ")})
        case _:
            sys.exit(__doc__)
