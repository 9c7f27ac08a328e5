"""Engine over several devices: its processes start and end with it, also when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nexusengine import Engine, SamplingParams
from nexusengine.errors import NexusError, WorkerLost
from tests.chaos.test_processes import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120)]
TWO = ["emulated:instant", "emulated:instant"]


_before: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def those_of_other_tests() -> None:
    """What earlier tests have left idle, as processes that render chat templates."""
    _before.clear()
    _before.update(psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p not in _before]


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


def test_bursts_are_spread_evenly_over_equal_devices_from_the_first_on() -> None:
    answers = SamplingParams(max_tokens=24, ignore_eos=True)
    with Engine("smollm2-135m", devices=["emulated:h100", "emulated:h100"]) as engine:
        for _ in range(4):  # reports are of the burst before, or of none
            outputs = engine.generate([f"Tell a story about the number {n}." for n in range(32)], answers)
            counts = Counter(o.service.worker for o in outputs if o.service is not None)
            assert abs(counts["w0"] - counts["w1"]) <= 2


def test_ctrl_c_while_starting_leaves_no_process() -> None:
    def interrupt_at_the_first_child() -> None:
        wait_until(lambda: children() != [])
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


_PROGRAM = """
import asyncio, gc, os, sys, threading, psutil
from nexusengine import AsyncEngine, Engine, SamplingParams
FEW, MANY = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 2000))
children = lambda: len(psutil.Process().children(recursive=True))
devices = sys.argv[1]
"""


def said_by(program: str, devices: str, tmp_path: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, without the log's lines, of a Python program of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM + textwrap.dedent(program), devices],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    noise = "\n".join(line for line in ran.stderr.splitlines() if " INFO " not in line)
    return ran.returncode, ran.stdout, noise


@pytest.mark.parametrize("devices", ["emulated:instant", ",".join(TWO)])
def test_a_deleted_engine_leaves_no_process_and_no_thread(devices: str, tmp_path: Path) -> None:
    program = """
        gc.disable()
        engine = Engine("smollm2-135m", devices=devices)
        engine.generate("a", FEW)
        news = engine.generate(["a", "b"], MANY, stream=True)
        next(news)
        del news, engine
        print(children(), [t.name for t in threading.enumerate()], os.listdir(os.environ["TMPDIR"]))
    """
    assert said_by(program, devices, tmp_path) == (0, "0 ['MainThread'] []\n", "")


@pytest.mark.parametrize("devices", ["emulated:instant", ",".join(TWO)])
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("news = engine.generate(['a', 'b'], MANY, stream=True); next(news)", 0),
        ("threading.Thread(target=lambda: list(engine.generate(['a'], MANY, stream=True)), daemon=True).start()", 0),
    ],
)
def test_an_engine_nobody_closed_ends_with_its_process_without_a_word(
    devices: str, ending: str, status: int, tmp_path: Path
) -> None:
    program = f"""
        engine = Engine("smollm2-135m", devices=devices)
        engine.generate("a", FEW)
        {ending}
    """
    assert said_by(program, devices, tmp_path) == (status, "", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("devices", ["emulated:instant", ",".join(TWO)])
@pytest.mark.parametrize("left", ["pass", "del engine", "global kept; kept = engine, news"])
def test_an_async_engine_nobody_closed_ends_as_well(devices: str, left: str, tmp_path: Path) -> None:
    program = f"""
        async def main():
            engine = await AsyncEngine("smollm2-135m", devices=devices).start()
            async for _ in engine.generate("a", FEW): pass
            news = engine.generate("a", MANY)
            await anext(news)
            {left}
        asyncio.run(main())
        gc.collect()
    """
    assert said_by(program, devices, tmp_path) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_a_fork_can_neither_use_nor_harm_the_engine(tmp_path: Path) -> None:
    program = """
        engine = Engine("smollm2-135m", devices=devices)
        for what in (lambda: engine.generate("a", FEW), engine.stats, engine.close):
            if os.fork() == 0:
                try:
                    what()
                except Exception as error:
                    print(type(error).__name__, flush=True)
                sys.exit(0)
            os.wait()
        print(len(engine.generate("a", FEW)[0].token_ids), flush=True)
    """
    assert said_by(program, ",".join(TWO), tmp_path) == (0, "Unavailable\nUnavailable\n3\n", "")


def test_workers_end_with_a_killed_parent_although_a_fork_of_it_lives_on(tmp_path: Path) -> None:
    program = """
        if os.fork() == 0:
            engine = Engine("smollm2-135m", devices=devices)
            pids = [child.pid for child in psutil.Process().children(recursive=True)]
            if (fork := os.fork()) == 0:
                os.closerange(0, 3)
                threading.Event().wait(60)
            print(fork, *pids, flush=True)
            os.kill(os.getpid(), 9)
        os.wait()
    """
    status, said, _ = said_by(program, ",".join(TWO), tmp_path)
    fork, *workers = map(int, said.split())
    try:
        assert (status, len(workers)) == (0, 3)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers))
        assert psutil.pid_exists(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_an_error_of_one_request_loses_no_output_of_the_others() -> None:
    """A worker that is killed: what it had begun to stream cannot be had again."""
    endless = SamplingParams(max_tokens=300, ignore_eos=True)
    with Engine("smollm2-135m", devices=["emulated:t4", "emulated:t4"]) as engine:
        news = engine.generate(["a", "b", "c", "d"], endless, stream=True)
        outputs = [next(news) for _ in range(20)]
        serving = max(engine._runner._session.engine.backend.status().workers, key=lambda w: w.outstanding)  # type: ignore[union-attr]
        os.kill(serving.info.pid, signal.SIGKILL)
        outputs += news
    ends = [o for o in outputs if o.finished]
    assert sorted(o.metadata["index"] for o in ends) == [0, 1, 2, 3]
    failed = [o for o in ends if o.error is not None]
    assert failed
    assert all(isinstance(o.error, WorkerLost) and o.finish_reason == "error" for o in failed)
    for end in ends:
        tokens = sum(len(o.token_ids) for o in outputs if o.metadata["index"] == end.metadata["index"])
        assert tokens == 300 or end.error is not None
