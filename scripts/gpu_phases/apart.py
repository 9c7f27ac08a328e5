"""Phases in processes of their own: one that crashes, hangs or breaks the device's context harms no other.

Processes are forked, so that torch is imported once; for that the parent never touches CUDA.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from gpu_phases.common import CasesFailed, Findings, Setting, Skip

Phase = Callable[[Setting], Findings]
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}
"""With it an error is raised by the launch that caused it."""
_FORK = multiprocessing.get_context("fork")
_LOOK_S = 0.2


def run_phase(
    phase: Phase, at: Setting, limit_s: float, left_s: float, environ: dict[str, str] | None = None
) -> Findings:
    """A phase's outcome, whatever happens in it.

    Args:
        phase: to be run.
        at: where.
        limit_s: seconds after which it begins nothing new; after twice as many it is killed.
        left_s: until the whole check has to be over.
        environ: of its process, beside what there is.

    Returns:
        result: pass, fail or skip; reason, trace and what it had found so far, as far as there are; took_s.
    """
    if left_s < 1.0:
        return {"result": "skip", "reason": "the time for the whole check was over", "took_s": 0.0}
    began_s = time.monotonic()
    here = dataclasses.replace(at, ends_s=began_s + min(limit_s, left_s))
    outcome = _in_child(phase, here, min(2 * limit_s, left_s), environ or {})
    outcome["took_s"] = round(time.monotonic() - began_s, 2)
    return outcome


def _in_child(phase: Phase, at: Setting, most_s: float, environ: dict[str, str]) -> Findings:
    receiving, sending = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_child, args=(phase, at, sending, environ))
    process.start()
    sending.close()
    ends_s = time.monotonic() + most_s
    so_far: Findings = {}
    reason = ""
    try:
        while not reason:
            if receiving.poll(max(min(_LOOK_S, ends_s - time.monotonic()), 0.0)):
                kind, what = json.loads(receiving.recv())
                if kind == "end":
                    return dict(what)
                so_far = what
            elif time.monotonic() >= ends_s:
                reason = f"it had not ended after {most_s:.0f} s and was killed"
            elif not process.is_alive() and not receiving.poll():
                reason = f"its process ended with {_words(process.exitcode)}"
    except EOFError:
        process.join(5.0)
        reason = f"its process ended with {_words(process.exitcode)}"
    finally:
        _kill(process.pid)
        process.join()
        receiving.close()
    return {"result": "fail", "reason": reason, **({"found": so_far} if so_far else {})}


def _words(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"status {code}"


def _kill(pid: int | None) -> None:
    """The process and whatever it started, as far as they are still there."""
    if pid is None:
        return
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)


def _child(phase: Phase, at: Setting, sending: Connection, environ: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environ)
    faulthandler.enable()

    def tell(found: Findings) -> None:
        sending.send(json.dumps(["so far", found]))

    try:
        with torch.inference_mode():
            outcome: Findings = {"result": "pass", "found": phase(dataclasses.replace(at, tell=tell))}
    except Skip as reason:
        outcome = {"result": "skip", "reason": str(reason)}
    except CasesFailed as error:
        outcome = {"result": "fail", "reason": str(error), "found": error.found, "trace": error.trace}
    except Exception as error:  # whatever it is, the other phases still tell something
        outcome = {"result": "fail", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    sending.send(json.dumps(["end", outcome]))
