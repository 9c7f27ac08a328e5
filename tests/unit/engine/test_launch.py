"""What is shown while serve starts: the model, the kernels and the workers at once, one phase at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from nexusengine.config import ServeConfig
from nexusengine.native.build import COMPILING
from nexusengine.process.control import Model
from nexusengine.supervisor.events import Compiling, Event, Phase, Resolved
from nexusengine.supervisor.supervisor import Supervisor


@pytest.fixture
def started(tmp_path: Path) -> tuple[Supervisor, list[Event]]:
    """A supervisor that has started nothing, and what it says."""
    seen: list[Event] = []
    config = ServeConfig(devices="cpu", runtime_dir=str(tmp_path / "run"))
    return Supervisor(config, with_server=False, on_event=seen.append), seen


def compiling(supervisor: Supervisor, fraction: float) -> None:
    supervisor._handle_own(Compiling(Phase(COMPILING, fraction)))


def test_compiling_is_shown_once_the_model_is_there(started: tuple[Supervisor, list[Event]]) -> None:
    supervisor, seen = started
    compiling(supervisor, 0.0)
    compiling(supervisor, 0.1)
    assert seen == [], "the download is what is waited for"
    supervisor._handle_own(Resolved(SimpleNamespace(path="model.gguf")))  # type: ignore[arg-type]
    compiling(supervisor, 0.5)
    assert seen == [Phase(COMPILING, f) for f in (0.1, 0.5)]


def test_compiling_that_is_over_before_the_model_is_there_is_not_shown(
    started: tuple[Supervisor, list[Event]],
) -> None:
    supervisor, seen = started
    compiling(supervisor, 1.0)
    supervisor._handle_own(Resolved(SimpleNamespace(path="model.gguf")))  # type: ignore[arg-type]
    assert seen == []


def test_a_worker_has_its_time_to_start_from_when_the_model_is_there(
    started: tuple[Supervisor, list[Event]],
) -> None:
    supervisor, _ = started
    sent: list[Model] = []
    role = supervisor._roles["w0"]
    role.child = SimpleNamespace(send=sent.append)  # type: ignore[assignment]
    role.waiting_since_s = None  # as when it is started before the model is there
    supervisor._turn()
    supervisor._handle_own(Resolved(SimpleNamespace(path="model.gguf")))  # type: ignore[arg-type]
    supervisor._turn()
    assert sent == [Model("model.gguf", supervisor.config.model)]
    assert role.waiting_since_s is not None
