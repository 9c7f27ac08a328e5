"""Writes step logs (perf.step_log) beside a running engine, from a thread of its own.

The engine's thread only puts references into a bounded queue. Every second what came is appended as a gzip member of
its own, so that the file is whole at any time and a killed process loses a second of it.
"""

from __future__ import annotations

import atexit
import gzip
import queue
import threading
from pathlib import Path

from nexusengine.arrays import I4
from nexusengine.errors import ConfigError
from nexusengine.execute.batch import StepBatch
from nexusengine.obs.batches import next_batch
from nexusengine.obs.logs import get_logger
from nexusengine.perf.step_log import LoggedStep, encode
from nexusengine.wire import StepRecord

_QUEUE_STEPS, _BATCH_STEPS, _FLUSH_S = 8192, 2000, 1.0
_MOST_BYTES = 2**30
_Item = tuple[StepRecord, I4, I4]
log = get_logger("step log")


class StepRecorder:
    """path: appended to. most_bytes: of the file; nothing is written beyond. dropped: steps that found the queue full.

    Raises ConfigError if the file cannot be written.
    """

    def __init__(self, path: str | Path, most_bytes: int = _MOST_BYTES) -> None:
        try:
            self._file = Path(path).open("ab")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"cannot write the step log {path}: {error.strerror}", param="step_log") from None
        self.dropped = self.written = 0
        self._path, self._room = path, most_bytes - self._file.tell()
        self._queue: queue.Queue[_Item | None] = queue.Queue(_QUEUE_STEPS)
        self._thread = threading.Thread(target=self._run, name="step log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, record: StepRecord, batch: StepBatch) -> None:
        """From the engine's thread; never waits. Keeps the arrays: they must not change afterwards."""
        try:
            self._queue.put_nowait((record, batch.counts, batch.starts))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is left. Safe to call twice."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        going = True
        while going:
            steps, going = next_batch(self._queue, _BATCH_STEPS, _FLUSH_S)
            lines = [encode(_logged(*step)) for step in steps]
            if lines:
                going = self._append(gzip.compress(b"".join(lines), 6, mtime=0), len(lines)) and going
        self._file.close()

    def _append(self, member: bytes, steps: int) -> bool:
        """Whether more can be written."""
        if len(member) > self._room:
            log.warning("%s is full; steps are no longer logged", self._path)
            return False
        try:
            self._file.write(member)
            self._file.flush()
        except OSError as error:
            log.warning("cannot write %s: %s; steps are no longer logged", self._path, error.strerror)
            return False
        self._room -= len(member)
        self.written += steps
        return True


def _logged(record: StepRecord, counts: I4, starts: I4) -> LoggedStep:
    return LoggedStep(
        t=round(record.started_s, 6),
        q=counts.tolist(),
        ctx=starts.tolist(),
        ms=round(max(record.device_s * 1e3, 1e-3), 4),
        waiting=record.waiting,
        running=max(record.running, len(counts)),
        sched_ms=round(record.scheduler_s * 1e3, 4),
    )
