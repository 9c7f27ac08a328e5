"""The supervisor with children that do not do what they should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nexusengine.supervisor.supervisor
from nexusengine.config import ServeConfig
from nexusengine.process.control import Failed as ControlFailed
from nexusengine.process.control import FromChild, Listening, Ready, RouterBoot, WorkerBoot, encode
from nexusengine.supervisor.events import Draining, Event
from nexusengine.supervisor.supervisor import Failed, Supervisor

LISTENING, READY = Listening("127.0.0.1", 1), Ready()


def supervisor(
    tmp_path: Path,
    says: dict[str, list[FromChild]],
    on_event: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Supervisor:
    """Its children only send these messages, by name."""
    fields = {"model": "smollm2-135m", "devices": "emulated:t4", "runtime_dir": str(tmp_path / "r"), **settings}
    made = Supervisor(ServeConfig(**fields), with_server=True, on_event=on_event)
    for name, role in made._roles.items():
        role.module = "tests.support.stub_child"
        role.environ = {"STUB_EVENTS": json.dumps([encode(message).decode() for message in says.get(name, [])])}
    return made


def test_a_process_that_says_that_it_failed_and_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.supervisor.supervisor, "_LAST_WORDS_S", 0.2)
    failed = ControlFailed("the disk is full")
    made = supervisor(tmp_path, {"router": [LISTENING], "server": [LISTENING, failed], "w0": []})
    made._roles["server"].environ["STUB_HANGS"] = "1"
    with pytest.raises(Failed, match="the disk is full"):
        made.run()


def test_a_server_that_never_gets_ready_ends_the_start(tmp_path: Path) -> None:
    made = supervisor(tmp_path, {"router": [LISTENING], "server": [LISTENING], "w0": [READY]}, start_timeout=3.0)
    with pytest.raises(Failed, match=r"server was not ready within 3\.0 s"):
        made.run()


def test_the_router_is_told_which_process_a_worker_is(tmp_path: Path) -> None:
    made = supervisor(tmp_path, {}, devices="emulated:t4,emulated:t4")
    try:
        router, *workers = (made._roles[name].boot() for name in ("router", "w0", "w1"))
        assert isinstance(router, RouterBoot)
        own = [boot.identity.epoch for boot in workers if isinstance(boot, WorkerBoot)]
        assert [worker.epoch for worker in router.workers] == own
        assert len({*own}) == 2
        assert all(own)
    finally:
        made._end_all()


def test_a_signal_before_a_worker_is_ready_ends_at_once(tmp_path: Path) -> None:
    """There is no request to finish; it used to wait for downloads, or until the drain time was over."""
    events: list[Event] = []
    says: dict[str, list[FromChild]] = {"router": [LISTENING], "server": [LISTENING, READY], "w0": []}
    made = supervisor(tmp_path, says, events.append, drain_timeout=5.0)
    made.drain()
    made.run()
    assert Draining not in {type(event) for event in events}


def test_a_message_that_is_unknown_ends_the_start_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexusengine.supervisor.supervisor, "_LAST_WORDS_S", 0.2)
    made = supervisor(tmp_path, {"router": [LISTENING]})
    made._roles["w0"].environ["STUB_EVENTS"] = json.dumps(['{"type": "finished"}'])
    with pytest.raises(Failed, match=r"w0 sent an unknown control message.*finished"):
        made.run()
