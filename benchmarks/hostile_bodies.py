"""How long /livez waits while a server reads request bodies that were made to hold it up.

Start a server, then: python benchmarks/hostile_bodies.py --url http://127.0.0.1:8000 [--json FILE] [--only WORD]
For each body a second process asks /livez every 10 ms until the reply is there; the table shows its longest wait.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

TEXT, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
_MB8 = 8_000_000
_WORDS = "The quick brown fox jumps over 13 lazy dogs, and the dogs do not mind. "


def _json(**body: Any) -> bytes:
    return json.dumps(body).encode()


def _words(length: int) -> str:
    return (_WORDS * (length // len(_WORDS) + 1))[:length]


BODIES: dict[str, tuple[str, Callable[[], bytes], int]] = {  # path, body, how many at once
    "nothing special": (TEXT, lambda: _json(prompt="2 + 2 =", max_tokens=1), 1),
    "1,024 prompts of 7.6 kB": (TEXT, lambda: _json(prompt=[_words(7_600)] * 1024, max_tokens=1, slo="none"), 1),
    "1,024 prompts of 100 tokens, one token each": (
        TEXT,
        lambda: _json(prompt=[[5] * 100] * 1024, max_tokens=1, slo="none"),
        1,
    ),
    "a prompt of 4,000,000 ids": (TEXT, lambda: b'{"prompt": [' + b"5," * 3_999_000 + b"5]}", 1),
    "a prompt of 1,300,000 large ids": (TEXT, lambda: b'{"prompt": [' + b"49000," * 1_300_000 + b"5]}", 1),
    "2,000,000 prompts": (TEXT, lambda: b'{"prompt": [' + b'"a",' * 1_990_000 + b'"a"]}', 1),
    "140,000 prompts": (TEXT, lambda: b'{"prompt": [' + b'"a",' * 140_000 + b'"a"]}', 1),
    "a prompt of 8 MB": (TEXT, lambda: _json(prompt=_words(_MB8)), 1),
    "a chat of 8 MB": (CHAT, lambda: _json(messages=[{"role": "user", "content": _words(_MB8)}]), 1),
    "20,000 parts of a message": (
        CHAT,
        lambda: _json(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]),
        1,
    ),
    "500,000 unknown fields": (TEXT, lambda: _json(prompt="x", **{f"k{i}": 1 for i in range(500_000)}), 1),
    "49,000 unknown fields": (TEXT, lambda: _json(prompt="x", max_tokens=1, **{f"k{i}": 1 for i in range(49_000)}), 1),
    "2,600,000 arrays": (TEXT, lambda: b'{"prompt": [' + b"[]," * 2_600_000 + b"[]]}", 1),
    "49,000 arrays": (TEXT, lambda: b'{"prompt": [' + b"[]," * 49_000 + b"[]]}", 1),
    "8 MB of brackets": (TEXT, lambda: b"[" * _MB8, 1),
    "8 MB of escapes": (TEXT, lambda: b'{"prompt": "' + b"\\u00e9" * 1_300_000 + b'"}', 1),
    "8 MB of quoted quotes": (TEXT, lambda: b'{"prompt": "' + b'\\"' * 3_990_000 + b'"}', 1),
    "8 MB of backslashes": (TEXT, lambda: b'{"prompt": "' + b"\\" * 7_900_000 + b'"}', 1),
    "a number of 8 MB": (TEXT, lambda: b'{"prompt": "x", "seed": ' + b"9" * 7_900_000 + b"}", 1),
    "8 MB that are not JSON": (TEXT, lambda: b"\xff" * _MB8, 1),
    "n=16 with logprobs": (
        TEXT,
        lambda: _json(prompt=[5], n=16, max_tokens=400, ignore_eos=True, logprobs=20, slo="none"),
        1,
    ),
    "a stop list of a million ids": (TEXT, lambda: _json(prompt="x", stop_token_ids=[5] * 1_000_000), 1),
    "a stop string of 8 MB": (TEXT, lambda: _json(prompt="x", stop="a" * 7_900_000, max_tokens=1), 1),
    "/tokenize of 8 MB with strings": (TOKENIZE, lambda: _json(prompt=_words(_MB8), return_token_strs=True), 1),
    "/tokenize of 8 MB, four at once": (TOKENIZE, lambda: _json(prompt=_words(_MB8)), 4),
    "/detokenize of 2,500,000 ids": (DETOKENIZE, lambda: b'{"tokens": [' + b"500," * 1_900_000 + b"500]}", 1),
}


def probe(host: str, port: int, ready: Event, stop: Event, longest_s: Any) -> None:
    """Ask /livez until `stop`; the longest wait for an answer goes into longest_s."""
    connection = http.client.HTTPConnection(host, port)
    while not stop.is_set():
        began_s = time.perf_counter()
        connection.request("GET", "/livez")
        connection.getresponse().read()
        longest_s.value = max(longest_s.value, time.perf_counter() - began_s)
        ready.set()
        time.sleep(0.01)


def send(host: str, port: int, path: str, body: bytes) -> str:
    """The reply's status, or the name of what went wrong."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return str(connection.getresponse().status)
    except OSError as error:
        return type(error).__name__


def measure(host: str, port: int, path: str, body: bytes, at_once: int) -> dict[str, Any]:
    """Longest wait for /livez in milliseconds, seconds until the last reply, statuses."""
    context = multiprocessing.get_context("spawn")
    ready, stop, longest_s = context.Event(), context.Event(), context.Value("d", 0.0)
    prober = context.Process(target=probe, args=(host, port, ready, stop, longest_s))
    prober.start()
    if not ready.wait(30):
        raise SystemExit(f"http://{host}:{port}/livez does not answer")
    longest_s.value = 0.0
    statuses: list[str] = []
    threads = [threading.Thread(target=lambda: statuses.append(send(host, port, path, body))) for _ in range(at_once)]
    began_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began_s
    time.sleep(0.2)
    stop.set()
    prober.join()
    return {"longest_ms": round(1e3 * longest_s.value, 1), "took_s": round(took_s, 2), "status": ",".join(statuses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", default="", metavar="WORD", help="bodies whose name holds this")
    args = parser.parse_args()
    url = urlsplit(args.url)
    results = {}
    print(f"{'body':45} {'longest /livez':>15} {'took':>8}  status")
    for name, (path, make, at_once) in BODIES.items():
        if args.only not in name:
            continue
        row = results[name] = measure(url.hostname or "", url.port or 80, path, make(), at_once)
        print(f"{name:45} {row['longest_ms']:12.1f} ms {row['took_s']:6.2f} s  {row['status']}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
