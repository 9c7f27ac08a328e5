"""The router's client: a router that does not answer does not leave its callers waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import nexusengine.serve.client
from nexusengine.serve.client import RouterClient
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta


async def test_requests_end_when_the_router_has_been_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.serve.client, "_GONE_S", 0.2)
    monkeypatch.setattr(nexusengine.serve.client, "_HELLO_EVERY_S", 0.02)
    client = RouterClient(f"ipc://{tmp_path}/nobody")
    await client.start()
    news: asyncio.Queue[TokenDelta] = asyncio.Queue()
    client.submit(EngineRequest("r", [1], SamplingParams(), 0.0), news.put_nowait)
    delta = await asyncio.wait_for(news.get(), 5)
    assert (delta.request_id, delta.finish_reason, delta.error_code) == ("r", "error", "unavailable")
    assert client.status() is None
    await client.close()
    assert news.empty()
