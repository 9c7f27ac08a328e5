"""Threads on one Engine with the embedded model: each gets the text it gets alone."""

from __future__ import annotations

import threading

import pytest

from nexusengine import Engine, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
THREADS, CALLS = 4, 4


def test_four_threads_get_the_texts_that_one_gets() -> None:
    topics = ("rivers", "stones", "birds", "bread", "music", "snow", "trains", "clocks")
    prompts = [[f"Tell me about {topic} number {i}" for i in range(2)] for topic in topics]
    failures: list[object] = []
    with Engine("smollm2-135m", devices="cpu:1") as engine:
        alone = [[o.text for o in engine.generate(p, GREEDY)] for p in prompts]

        def caller(number: int) -> None:
            for call in range(CALLS):
                which = (number + THREADS * call) % len(prompts)
                texts = ["", ""]
                if call % 2:
                    for piece in engine.generate(prompts[which], GREEDY, stream=True):
                        texts[piece.metadata["index"]] += piece.text
                else:
                    texts = [o.text for o in engine.generate(prompts[which], GREEDY)]
                if texts != alone[which]:
                    failures.append((which, texts, alone[which]))

        threads = [threading.Thread(target=caller, args=(n,), daemon=True) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
        assert engine.stats()["running"] == 0
    assert failures == []
