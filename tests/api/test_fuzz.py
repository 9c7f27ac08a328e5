"""Bodies made at random out of what clients send: whatever comes, the reply is 200 or names the fault, never a 5xx.

BODIES=20000 python -m pytest tests/api/test_fuzz.py -s is the long form.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import httpx

from nexusengine.server import fields
from nexusengine.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.api.conftest import Running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
NAMES = {
    TEXT: [*CompletionRequest.model_fields, *fields.TEXT, "user", "flavour"],
    CHAT: [*ChatRequest.model_fields, *fields.CHAT, "user", "flavour"],
    "/tokenize": [*TokenizeRequest.model_fields, *fields.TOKENIZE],
    "/detokenize": [*DetokenizeRequest.model_fields, *fields.DETOKENIZE],
}
SOUND: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "ab", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [1, 2]},
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 16, 17, 97, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5, 1.0, -0.5, 1e308, -0.0),
    *("", "a", "\x00", "é🦙", "\ud800", "none", "auto", "fake", "interactive", "x" * 500, [], [1], [1.0], ["a"], [""]),
    *([None], [[]], [[1]], [["a"]], [1, "a"], {}, {"a": 1}, {"type": "text"}, {"include_usage": True}, {"ttft_ms": 5}),
    *([{"role": "user", "content": "a"}], [{"role": "assistant", "content": None}], [{"role": "tool"}], [{}]),
    [{"role": "user", "content": [{"type": "text", "text": "\ud800"}], "name": {"a": [1]}}],
]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth < 3 and kind < 0.1:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and kind < 0.2:
        return {str(rng.choice(VALUES)): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice(VALUES)


def random_body(rng: random.Random, path: str) -> bytes:
    body = dict(SOUND[path])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        body[rng.choice(NAMES[path])] = random_value(rng)
    content = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:  # a few bytes changed, dropped or repeated
        at = rng.randrange(len(content))
        content = content[:at] + rng.choice([b"", b"\xff", b"NaN", b'"', b"\\", content[at:]]) + content[at + 1 :]
    return content


def test_no_body_makes_the_server_fail(server: Running) -> None:
    seed = random.randrange(2**32)
    rng, seen = random.Random(seed), Counter[int]()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(int(os.environ.get("BODIES", "400"))):
            path = rng.choice(list(SOUND))
            content = random_body(rng, path)
            reply = client.post(path, content=content)
            seen[reply.status_code] += 1
            told = f"seed {seed}, {path}, {content!r}: {reply.text}"
            if reply.status_code == 200:
                continue
            assert reply.status_code in (400, 404), told
            assert reply.json()["error"]["type"] == "invalid_request_error", told
            assert reply.json()["error"]["message"], told
    print(dict(seen))
    assert seen[200] > 0
    assert server.idle()
