"""The OpenAI SDK, which knows nothing of relay: only its base URL is relay's.

python client.py                        ask, as ever
python client.py --key KEY              ask, safe to repeat: the same key is the same answer
python client.py --key KEY --after ID   go on with that answer, behind the event ID
"""

import argparse
from collections.abc import Iterator

import openai
from openai.types.chat import ChatCompletionChunk

client = openai.OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="unused")

QUESTION = {"model": "any", "messages": [{"role": "user", "content": "Count to forty."}], "stream": True}


def asked() -> Iterator[tuple[str, str]]:
    """An answer's text. The SDK's stream does not tell the ids of events."""
    with client.chat.completions.create(**QUESTION) as stream:
        for chunk in stream:
            yield "", chunk.choices[0].delta.content or ""


def kept(key: str, cursor: str) -> Iterator[tuple[str, str]]:
    """The same, or what follows the event `cursor`, each piece with its event's id: so its lines are read."""
    headers = {"Idempotency-Key": key} | ({"Last-Event-ID": cursor} if cursor else {})
    create = client.chat.completions.with_streaming_response.create
    with create(**QUESTION, extra_headers=headers) as response:
        for line in response.iter_lines():
            if line.startswith("id: "):
                cursor = line.removeprefix("id: ")
            elif line.startswith("data: {"):
                chunk = ChatCompletionChunk.model_validate_json(line.removeprefix("data: "))
                yield cursor, chunk.choices[0].delta.content or ""


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--key")
    options.add_argument("--after", default="")
    given = options.parse_args()
    last = given.after, ""
    try:
        for last in kept(given.key, given.after) if given.key else asked():
            print(last[1], end="", flush=True)
    except KeyboardInterrupt:
        if not given.key:
            raise
        print(f"\nGo on: python client.py --key {given.key} --after {last[0]}", end="")
    print()
