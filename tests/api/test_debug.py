"""/debug and `nexusengine explain`, over one core in this process and over the real processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from nexusengine.cli.main import main
from tests.api.conftest import Running
from tests.conftest import Served

TEXT = "/v1/completions"


def ask(url: str, **body: Any) -> str:
    reply = httpx.post(url + TEXT, json={"prompt": "x" * 30, "max_tokens": 4} | body, timeout=30)
    assert reply.status_code == 200, reply.text
    request_id: str = reply.json()["id"]
    return request_id


def test_without_the_setting_there_is_nothing_to_see(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/debug/steps", "/debug/requests/x"):
        reply = httpx.get(server.url + path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        assert "--debug-endpoints" in reply.json()["error"]["message"]
    assert main(["explain", "x", "--url", server.url]) == 1
    assert "--debug-endpoints" in capsys.readouterr().err


def test_steps_and_requests_can_be_looked_at(
    start_server: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(debug_endpoints=True)
    request_id = ask(server.url, slo="batch")
    workers = httpx.get(server.url + "/debug/steps?last=3").json()["workers"]
    assert [s["step"] for s in workers["w0"]] == [2, 3, 4]
    assert workers["w0"][-1]["reasons"] == {"decode": 1}
    assert workers["w0"][-1]["predicted_ms"] > 0
    (history,) = httpx.get(f"{server.url}/debug/requests/{request_id}").json()["histories"]
    assert (history["class"], history["finish_reason"], history["met"]) == ("batch", "length", True)
    assert [c["reason"] for c in history["changes"]] == ["admitted", "decode"]
    assert main(["explain", request_id, "--url", server.url]) == 0
    told = capsys.readouterr().out
    assert request_id in told
    assert "gets KV blocks and begins its prompt: 30 tokens" in told
    assert "its promise is kept" in told
    assert main(["explain", request_id, "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["histories"][0]["request_id"] == request_id


def test_a_note_that_is_infinite_is_null(start_server: Callable[..., Running]) -> None:
    """Such as the limit of a step that nothing limits; JSON has no word for it."""
    server = start_server(debug_endpoints=True)
    policy = server.core.scheduler.policy
    planned = policy.plan
    policy.plan = lambda view, now: replace(planned(view, now), notes={"limit_ms": math.inf, "on_time": 1.0})  # type: ignore[method-assign]
    request_id = ask(server.url)
    steps = httpx.get(server.url + "/debug/steps").json()["workers"]["w0"]
    assert steps[-1]["notes"] == {"limit_ms": None, "on_time": 1.0}
    assert httpx.get(f"{server.url}/debug/requests/{request_id}").status_code == 200


def test_what_is_not_there_or_not_a_number_is_named(
    start_server: Callable[..., Running], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_server(debug_endpoints=True, api_key="secret")
    key = {"Authorization": "Bearer secret"}
    for last in ("0", "-1", "x", "513", "9" * 5000, "\u00b2"):
        reply = httpx.get(server.url + "/debug/steps", params={"last": last}, headers=key)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "last")
    reply = httpx.get(server.url + "/debug/requests/nobody", headers=key)
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "request_id")
    assert httpx.get(server.url + "/debug/steps").status_code == 401
    assert main(["explain", "nobody", "--url", server.url, "--api-key", "secret"]) == 1
    assert "no worker remembers a request 'nobody'" in capsys.readouterr().err
    assert main(["explain", "a/b c", "--url", server.url, "--api-key", "secret"]) == 1
    assert main(["explain", "x", "--url", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1: Connection refused; name it with --url" in capsys.readouterr().err


def test_the_workers_behind_the_router_are_asked(serve: Callable[..., Served]) -> None:
    served = serve("--devices", "emulated:instant,emulated:instant", "--debug-endpoints", "--nexus-verdict")
    replies = [httpx.post(served.url + TEXT, json={"prompt": "hello", "max_tokens": 3}).json() for _ in range(4)]
    workers = httpx.get(served.url + "/debug/steps").json()["workers"]
    assert set(workers) == {"w0", "w1"} == {r["nexus"]["worker"] for r in replies}
    for reply in replies:
        (history,) = httpx.get(f"{served.url}/debug/requests/{reply['id']}").json()["histories"]
        assert history["worker"] == reply["nexus"]["worker"]
        assert history["predicted_ttft_ms"] == reply["nexus"]["predicted_ttft_ms"]
    assert httpx.get(f"{served.url}/debug/requests/nobody").status_code == 404
