"""The embedded model with overlapping steps: the same greedy text as one step at a time."""

from __future__ import annotations

import pytest

from nexusengine.clock import MonotonicClock
from nexusengine.config import parse_device
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.factory import make_executor
from nexusengine.loading.resolve import resolve_model
from nexusengine.perf.registry import make_model
from nexusengine.scheduler.baselines.fcfs import FCFS
from tests.support.fakes import request, run

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


def test_greedy_text_is_the_same_with_and_without_overlap() -> None:
    pytest.importorskip("torch")
    files = resolve_model("smollm2-135m")
    answers = []
    for overlap in (False, True):
        options = ExecutorOptions(kv_cache_bytes=32 * 2**20, max_model_len=256, max_running=4, overlap=overlap)
        executor = make_executor(files, parse_device("cpu"), options)
        core = EngineCore(
            executor,
            FCFS(64),
            make_model(),
            clock=MonotonicClock(),
            max_running=4,
            hash_key=b"k",
            check_every_step=True,
        )
        for i in range(5):
            core.add(request(str(i), list(range(50 + i, 70 + 5 * i)), max_tokens=6 + i, eos_token_ids=[2]))
        answers.append({name: tokens for name, (tokens, _) in run(core).items()})
        executor.close()
    assert answers[0] == answers[1]
