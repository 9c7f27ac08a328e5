"""Greedy text equals transformers' for 32 prompts of 5 to 1,500 tokens, however they are scheduled."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from typing import Any

import pytest

from nexusengine import Engine, SamplingParams
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.view import EngineView

from .conftest import OUTPUT_TOKENS, Reference

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
SETTINGS: dict[str, Any] = {"devices": "cpu", "kv_cache_memory": "1GiB", "dtype": "float32", "prefix_caching": False}


def mismatches(reference: Reference, answers: list[list[int]]) -> list[int]:
    """Lengths of the prompts whose answer differs."""
    return [
        len(p) for p, ours, theirs in zip(reference.prompts, answers, reference.answers, strict=True) if ours != theirs
    ]


def checked(settings: dict[str, Any]) -> Engine:
    """An engine in this process that verifies every invariant after each step."""
    engine = Engine("smollm2-135m", **SETTINGS | settings)
    engine._runner.core._check_every_step = True  # type: ignore[union-attr]
    return engine


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_running": 1}, id="alone"),
        pytest.param({"scheduler": "fcfs:budget=16", "max_running": 8}, id="chunks of 16"),
        pytest.param({"scheduler": "fcfs:budget=512"}, id="chunks of 512"),
    ],
)
def test_greedy_text_does_not_depend_on_the_schedule(reference: Reference, settings: dict[str, Any]) -> None:
    with checked(settings) as engine:
        outputs = engine.generate(reference.prompts, GREEDY, progress=False)
    assert mismatches(reference, [list(o.token_ids) for o in outputs]) == []
    assert [o.text for o in outputs] == reference.texts


def test_greedy_text_does_not_depend_on_the_prefix_cache(reference: Reference) -> None:
    with checked({"prefix_caching": True}) as engine:
        first = engine.generate(reference.prompts, GREEDY, progress=False)
        second = engine.generate(reference.prompts, GREEDY, progress=False)
    assert mismatches(reference, [list(o.token_ids) for o in first]) == []
    assert mismatches(reference, [list(o.token_ids) for o in second]) == []
    assert all(o.cached_tokens == (len(o.prompt_token_ids) - 1) // 16 * 16 for o in second)


class Preempting:
    """FCFS that takes the newest sequence's KV back at every second step."""

    name = "preempting"

    def __init__(self) -> None:
        self._inner, self._steps = FCFS(), 0
        self.traits = self._inner.traits

    def plan(self, view: EngineView, now: float) -> StepPlan:
        plan = self._inner.plan(view, now)
        self._steps += 1
        if self._steps % 2 or len(view.running) < 2 or plan.preempt:
            return plan
        victim = int(view.running[-1])
        keep = plan.slots != victim
        return replace(plan, slots=plan.slots[keep], counts=plan.counts[keep], preempt=(victim,))


def test_greedy_text_survives_preemption(reference: Reference) -> None:
    with checked({"prefix_caching": True}) as engine:
        engine._runner.core.scheduler.policy = Preempting()  # type: ignore[union-attr]
        outputs = engine.generate(reference.prompts, GREEDY, progress=False)
        assert engine.stats()["preemptions"] >= 5
    assert mismatches(reference, [list(o.token_ids) for o in outputs]) == []


def test_greedy_text_is_the_same_over_http(reference: Reference, serve: Any) -> None:
    """The whole stack, two workers, whole and streamed; prompts as token ids so that the comparison is exact."""
    url = serve("--devices", "cpu:1,cpu:1", "--dtype", "float32", "--kv-cache-memory", "1GiB").url
    body = {"model": "smollm2-135m", "prompt": reference.prompts, "max_tokens": OUTPUT_TOKENS, "temperature": 0}

    def post(**more: Any) -> Any:
        content = json.dumps(body | {"ignore_eos": True} | more).encode()
        request = urllib.request.Request(f"{url}/v1/completions", content, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=600)

    with post() as reply:
        choices = json.load(reply)["choices"]
    assert [c["text"] for c in sorted(choices, key=lambda c: c["index"])] == reference.texts
    streamed = [""] * len(reference.texts)
    with post(stream=True) as reply:
        events = [line.removeprefix(b"data: ") for line in reply if line.startswith(b"data: ")]
    assert events.pop().strip() == b"[DONE]"
    for choice in (json.loads(event)["choices"][0] for event in events):
        streamed[choice["index"]] += choice["text"]
    assert streamed == reference.texts
