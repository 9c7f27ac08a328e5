"""Engine over several devices: its processes start and end with it, also when it is interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from nexusengine import Engine, SamplingParams
from nexusengine.errors import NexusError
from tests.chaos.test_processes import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]
TWO = ["emulated:instant", "emulated:instant"]


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def test_ctrl_c_aborts_what_is_in_flight_and_leaves_a_usable_engine() -> None:
    endless = SamplingParams(max_tokens=2000, ignore_eos=True)
    with Engine("smollm2-135m", devices=["emulated:t4", "emulated:t4"]) as engine:
        with pytest.raises(KeyboardInterrupt), ctrl_c_after(1.0):
            engine.generate(["a", "b", "c"], endless)
        wait_until(lambda: engine.stats()["running"] == 0)
        assert engine.stats()["finished_abort"] == 3
        assert len(engine.generate("x", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    assert children() == []


def test_ctrl_c_while_starting_leaves_no_process() -> None:
    def interrupt_at_the_first_child() -> None:
        wait_until(children)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_at_the_first_child).start()
    with pytest.raises(KeyboardInterrupt):
        Engine("smollm2-135m", devices=TWO)
    assert children() == []


def test_a_device_that_cannot_start_is_an_error_with_its_cause_and_leaves_no_process() -> None:
    with pytest.raises(NexusError, match="nosuch"):
        Engine("smollm2-135m", devices=["emulated:instant", "emulated:nosuch"])
    assert children() == []


def test_more_prompts_than_the_queues_hold_are_all_answered_in_order() -> None:
    with Engine("smollm2-135m", devices=TWO, max_running=2, max_waiting=3) as engine:
        sampling = [SamplingParams(max_tokens=1 + i % 7, ignore_eos=True) for i in range(60)]
        outputs = engine.generate([f"prompt {i}" for i in range(60)], sampling)
    assert [len(o.token_ids) for o in outputs] == [1 + i % 7 for i in range(60)]
    assert [o.prompt for o in outputs] == [f"prompt {i}" for i in range(60)]
