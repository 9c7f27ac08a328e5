"""The cheaper of workers that keep the promise with margin; nothing changes where no worker has any, or by default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nexusengine.errors import ConfigError
from nexusengine.profiles.prices import FILE_VARIABLE, usual_costs
from nexusengine.router.placement.policy import Place, PlacementRequest, WorkerView
from nexusengine.router.placement.prism import Prism
from nexusengine.router.placement.registry import make_policy
from tests.support.router_fakes import load, pending, request, view


@pytest.fixture(autouse=True)
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two devices of one speed, of which one costs and draws five times as much."""
    path = tmp_path / "costs.toml"
    path.write_text("[dear]\nprice = 5\nidle_w = 50\nbusy_w = 550\n[cheap]\nprice = 1\nidle_w = 10\nbusy_w = 110\n")
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    usual_costs.cache_clear()
    yield
    usual_costs.cache_clear()


def worker(name: str, device: str, decodes: int = 4, **fields: Any) -> WorkerView:
    made = view(name, load(decodes=decodes, **fields), outstanding=decodes)
    return replace(made, info=msgspec.structs.replace(made.info, device=device))


def placed(spec: str, workers: list[WorkerView], what: PlacementRequest | None = None, count: int = 6) -> list[str]:
    policy = make_policy(spec)
    decisions = [policy.place(what or request(f"r{i}"), workers, 0.0) for i in range(count)]
    return [d.worker_id for d in decisions if isinstance(d, Place)]


@pytest.mark.parametrize("spec", ["prism:energy=1", "prism:cost=1", "prism:cost=0.5,energy=0.5"])
def test_of_equals_the_cheaper_is_taken(spec: str) -> None:
    workers = [worker("w0", "dear"), worker("w1", "cheap")]
    assert set(placed(spec, workers)) == {"w1"}
    assert set(placed("prism", workers)) == {"w0", "w1"}, "by default they go round"


def test_a_worker_that_decodes_anyway_is_cheaper_than_one_that_is_idle() -> None:
    workers = [worker("w0", "dear", decodes=12), worker("w1", "cheap", decodes=0)]
    assert set(placed("prism:energy=1", workers)) == {"w0"}


def test_without_margin_it_is_as_if_it_were_off() -> None:
    """The cheap one has prompts ahead that take most of the TTFT: the request goes where it waits less."""
    queue = (pending(0.45, 12_000),)
    workers = [worker("w0", "dear"), worker("w1", "cheap", pending=queue)]
    assert set(placed("prism:energy=1", workers)) == {"w0"}
    both = [worker("w0", "dear", pending=queue), worker("w1", "cheap", pending=queue)]
    assert placed("prism:energy=1", both) == placed("prism", both)


def test_a_device_of_which_nothing_is_known_is_never_preferred() -> None:
    workers = [worker("w0", "unheard-of"), worker("w1", "cheap"), worker("w2", "dear")]
    assert set(placed("prism:cost=1", workers)) == {"w1"}
    unknown = [worker("w0", "one"), worker("w1", "other")]
    assert placed("prism:cost=1", unknown) == placed("prism", unknown)


def test_a_request_without_promise_goes_to_the_cheaper_too() -> None:
    workers = [worker("w0", "dear"), worker("w1", "cheap")]
    assert set(placed("prism:energy=1", workers, request(slo=None))) == {"w1"}


def test_weights_are_not_negative() -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        Prism(energy=-1.0)
