"""Processes that are killed, stopped, told to end or cannot start: nothing hangs, nothing stays behind.

The workers are emulated devices: real processes, sockets and schedulers; the tokens are made up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.conftest import Served, free_port, runs

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]
TEXT = "/v1/completions"
Serve = Callable[..., Served]


class Stream:
    """A streaming request in a thread: its text chunks, and how it ended."""

    def __init__(self, url: str, max_tokens: int, prompt: str = "x") -> None:
        self.chunks, self.end = 0, ""
        self.tokens = 0
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        body["stream_options"] = {"include_usage": True}
        self._thread = threading.Thread(target=self._run, args=(url, body), daemon=True)
        self._thread.start()

    def _run(self, url: str, body: dict[str, Any]) -> None:
        try:
            self._read(url, body)
        except httpx.RemoteProtocolError:
            self.end = "broken off"

    def _read(self, url: str, body: dict[str, Any]) -> None:
        with httpx.stream("POST", url + TEXT, json=body, timeout=120) as reply:
            if reply.status_code != 200:
                reply.read()
                self.end = reply.json()["error"]["code"]
                return
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    self.end = "done"
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    self.chunks += "choices" in event
                    self.tokens = (event.get("usage") or {}).get("completion_tokens", 0)
                    if "error" in event:
                        self.end = event["error"]["code"]

    def wait_for_tokens(self) -> None:
        wait_until(lambda: self.chunks > 0)

    def join(self) -> str:
        self._thread.join(120)
        assert not self._thread.is_alive(), "a stream hangs"
        return self.end


def wait_until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.02)


def at_rest(served: Served) -> bool:
    """Whether ledger, queues and KV are all back at zero."""
    names = ("router_ledger", "router_held", "worker_running", "worker_waiting", "worker_kv_used_blocks")
    return not any(value for n in names for value in served.metric(f"nexusengine_{n}").values())


def outstanding(served: Served) -> dict[str, float]:
    return served.metric("nexusengine_worker_outstanding")


def test_a_killed_worker_costs_only_what_it_was_streaming_and_comes_back(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:t4", "--max-running", "1")
    streams = [Stream(served.url, 700), Stream(served.url, 700)]
    for stream in streams:
        stream.wait_for_tokens()
    waiting = Stream(served.url, 20)
    wait_until(lambda: max(outstanding(served).values()) == 2)
    victim = max(outstanding(served), key=lambda w: outstanding(served)[w])
    (pid,) = [w["pid"] for w in served.workers() if w["id"] == victim]
    assert waiting.chunks == 0
    os.kill(pid, signal.SIGKILL)
    assert waiting.join() == "done"
    assert waiting.tokens == 20
    assert sorted(s.join() for s in streams) == ["done", "worker_lost"]
    wait_until(lambda: all(w["state"] == "ready" for w in served.workers()))
    restarted = {w["id"]: w["restarts"] for w in served.workers()}
    assert restarted[victim] == 1
    assert sum(restarted.values()) == 1
    assert Stream(served.url, 5).join() == Stream(served.url, 5).join() == "done"
    wait_until(lambda: at_rest(served))


def test_an_answer_sent_whole_survives_the_worker_that_was_writing_it(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:t4")
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "seed": 7}
    expected = httpx.post(served.url + TEXT, json=body, timeout=60).json()["choices"][0]["text"]
    replies: list[httpx.Response] = []
    client = threading.Thread(target=lambda: replies.append(httpx.post(served.url + TEXT, json=body, timeout=120)))
    before = served.metric("nexusengine_worker_generated_tokens_total")
    client.start()
    busy: list[str] = []

    def is_writing() -> bool:
        now = served.metric("nexusengine_worker_generated_tokens_total")
        busy[:] = [w for w in now if now[w] - before[w] > 20]
        return bool(busy)

    wait_until(is_writing)
    (pid,) = [w["pid"] for w in served.workers() if w["id"] == busy[0]]
    os.kill(pid, signal.SIGKILL)
    client.join(120)
    assert [r.status_code for r in replies] == [200]
    assert replies[0].json()["choices"][0]["text"] == expected
    assert replies[0].json()["usage"]["completion_tokens"] == 200
    wait_until(lambda: at_rest(served))


def test_a_killed_router_is_replaced_and_its_requests_are_told(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:t4")
    stream = Stream(served.url, 3000)
    stream.wait_for_tokens()
    (router,) = [p for p in psutil.Process(served.process.pid).children() if "nexusengine.router.broker" in p.cmdline()]
    router.kill()
    assert stream.join() == "worker_lost"
    wait_until(lambda: httpx.get(served.url + "/readyz").status_code == 200)
    assert Stream(served.url, 5).join() == "done"
    wait_until(lambda: at_rest(served))


def test_a_stopped_worker_gets_no_new_requests_and_goes_on_when_it_is_continued(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:t4")
    stopped = served.workers()[0]
    os.kill(stopped["pid"], signal.SIGSTOP)
    try:
        wait_until(lambda: {w["id"]: w["state"] for w in served.workers()}[stopped["id"]] == "stalled")
        assert [Stream(served.url, 3).join() for _ in range(4)] == ["done"] * 4
    finally:
        os.kill(stopped["pid"], signal.SIGCONT)
    wait_until(lambda: all(w["state"] == "ready" for w in served.workers()))
    wait_until(lambda: at_rest(served))


def test_nothing_outlives_a_killed_supervisor(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:l4")
    Stream(served.url, 2000).wait_for_tokens()
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert len(children) == 5, "router, server, two workers, and what renders chat templates"
    served.process.kill()
    wait_until(lambda: not any(map(runs, children)), timeout_s=2.0)


@pytest.mark.parametrize("everyone", [False, True], ids=["the supervisor", "every process"])
def test_on_sigterm_running_requests_finish_and_new_ones_are_refused(serve: Serve, everyone: bool) -> None:
    """Service managers and Ctrl-C signal the whole group; `timeout` signals its own child twice."""
    served = serve("--devices", "emulated:t4")
    stream = Stream(served.url, 500)
    stream.wait_for_tokens()
    children = psutil.Process(served.process.pid).children(recursive=True)
    for process in [*children, served.process, served.process] if everyone else [served.process]:
        process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(served.url + "/readyz").status_code == 503)
    assert Stream(served.url, 5).join() == "unavailable"
    assert stream.join() == "done"
    assert stream.tokens == 500
    assert served.process.wait(15) == 0
    assert not any(p.is_running() for p in children)


def test_64_requests_half_of_them_aborted_leave_ledger_queues_and_cache_empty(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:l4", "--max-running", "8")
    streams = [Stream(served.url, 150, prompt="x " * i) for i in range(1, 33)]

    def leave(i: int) -> None:
        body = {"prompt": "y " * i, "max_tokens": 150, "stream": True}
        with httpx.stream("POST", served.url + TEXT, json=body, timeout=60) as reply:
            for n, _ in enumerate(reply.iter_lines()):
                if n >= i:
                    return

    leavers = [threading.Thread(target=leave, args=(i,)) for i in range(1, 33)]
    for t in leavers:
        t.start()
    for t in leavers:
        t.join()
    assert [s.join() for s in streams] == ["done"] * 32
    wait_until(lambda: at_rest(served))


def start_and_fail(*options: str) -> str:
    """stderr of a serve that must not come up; nothing of it may stay."""
    marker = f"nexusengine-test-{free_port()}"
    done = subprocess.run(
        [sys.executable, "-m", "nexusengine.cli.main", "serve", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "MARKER": marker},
    )
    assert done.returncode == 1, done.stderr
    alive = [p for p in psutil.process_iter() if marker in _environment(p)]
    assert alive == []
    (cause,) = [line for line in done.stderr.splitlines() if line.startswith("nexusengine: ")]
    assert "Traceback" not in done.stderr, done.stderr
    return cause


def _environment(process: psutil.Process) -> str:
    try:
        return str(process.environ().get("MARKER", ""))
    except psutil.Error:
        return ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "cuda:0"), "cuda:0"),
        (("--devices", "emulated:abacus"), "abacus"),
        (("--devices", "tpu"), "tpu"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--scheduler", "guess"), "guess"),
        (("--devices", "emulated:t4", "--max-model-len", "9000"), "9000"),
        (("--devices", "emulated:t4", "--kv-cache-memory", "1k"), "1000 bytes"),
    ],
)
def test_a_start_that_cannot_succeed_ends_at_once_with_its_cause(options: tuple[str, ...], words: str) -> None:
    assert words in start_and_fail(*options)


def test_a_runtime_folder_that_cannot_be_used_is_named(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "runtime"
    long = tmp_path / ("x" * 100)
    assert f"{long} is too long" in start_and_fail("--devices", "emulated:t4", "--runtime-dir", str(long))
    served = serve("--devices", "emulated:t4", "--runtime-dir", str(folder))
    assert "used by another engine" in start_and_fail("--devices", "emulated:t4", "--runtime-dir", str(folder))
    assert Stream(served.url, 3).join() == "done"


def test_a_port_in_use_is_named(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4")
    port = served.url.rsplit(":", 1)[1]
    assert f"port {port}" in start_and_fail("--devices", "emulated:t4", "--port", port)


def test_a_killed_server_is_replaced_at_the_port_it_had(serve: Serve, tmp_path: Path) -> None:
    served = serve("--devices", "emulated:t4", port=0)
    (server,) = [p for p in psutil.Process(served.process.pid).children() if "nexusengine.server.main" in p.cmdline()]
    stream = Stream(served.url, 3000)
    stream.wait_for_tokens()
    server.kill()
    assert stream.join() == "broken off"
    wait_until(lambda: answers(served.url + "/readyz"))
    assert Stream(served.url, 5).join() == "done"
    wait_until(lambda: at_rest(served))  # the router gives up what the old server had asked for


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def test_a_model_without_its_tokenizer_is_named_at_once(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    cause = start_and_fail("--model", str(tmp_path), "--devices", "emulated:instant")
    assert cause.startswith(f"nexusengine: {tmp_path}/tokenizer.json is missing")


def test_a_tokenizer_that_raises_ends_the_start_in_one_sentence(tmp_path: Path) -> None:
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {}}))
    cause = start_and_fail("--model", str(tmp_path), "--devices", "emulated:instant")
    assert "token" in cause
    assert str(tmp_path) in cause


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_download_ends_with_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    """The index is there but never answers."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        port = index.getsockname()[1]
        environ = {"NEXUSENGINE_CACHE": str(tmp_path), "PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple"}
        served = subprocess.Popen(
            [sys.executable, "-m", "nexusengine.cli.main", "serve", "--port", "0"],
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environ},
        )
        supervisor = psutil.Process(served.pid)
        wait_until(lambda: any("pip" in p.cmdline() for p in supervisor.children()))
        children = supervisor.children(recursive=True)
        assert len(children) >= 4, "router, server, worker and pip; and a compiler, if there is one"
        supervisor.send_signal(number)
        served.wait(15)
        wait_until(lambda: not any(map(runs, children)), timeout_s=2.0)


@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_a_damaged_weight_file_is_named(tmp_path: Path, damage: str) -> None:
    from nexusengine.loading.resolve import resolve_model

    content = resolve_model("smollm2-135m").path.read_bytes()
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"GGUX" + content[4:1_000_000])
    assert "damaged.gguf" in start_and_fail("--model", str(file), "--devices", "cpu")
