"""Records what is asked of the server (`--record-trace`), beside the event loop and without ever holding it up.

The event loop puts what has ended into a bounded queue; a thread hashes the prompts, and writes once a second. What
finds the queue full, or a disk that is, is dropped and counted.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from nexusengine import __version__
from nexusengine.config import ServeConfig
from nexusengine.obs.batches import next_batch
from nexusengine.obs.logs import get_logger
from nexusengine.recording import format as lines
from nexusengine.recording.files import TraceFiles
from nexusengine.recording.keys import Keys
from nexusengine.server.recorded_request import Generations
from nexusengine.server.step_samples import StepSamples
from nexusengine.slo.classes import SLOClass
from nexusengine.wire import Cluster, WorkerStatus

_QUEUED, _QUEUED_TOKENS = 4096, 2**23
_BATCH, _FLUSH_S = 1024, 1.0
_WORKERS_EVERY_S, _RETRY_S = 60.0, 10.0
_USUAL_BLOCK_TOKENS = 16
log = get_logger("trace")


@dataclass(frozen=True, slots=True)
class _Item:
    """A line without its hashes, and the tokens they are of."""

    line: lines.Request
    prompt: Sequence[int]
    answer: Sequence[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


class Recorder:
    """Writes the trace of a server.

    Args:
        config: with `record_trace`.
        now: monotonic clock.

    Attributes:
        keys: of the hashes.
        steps: samples of the workers' steps.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, config: ServeConfig, now: Callable[[], float] = time.monotonic) -> None:
        assert config.record_trace is not None
        self._config, self._now = config, now
        self._began_s, self._started_unix_s = now(), time.time()
        self._recording = secrets.token_hex(8)
        self.keys = Keys(config.record_trace_key)
        self._files = TraceFiles(
            config.record_trace, config.record_trace_bytes, config.record_trace_files, self._header
        )
        self.steps = StepSamples(self._began_s)
        self._numbers = itertools.count()
        self._queue: queue.Queue[_Item | None] = queue.Queue(_QUEUED)
        self._lock = threading.Lock()
        self._queued_tokens = 0
        self._closing = False
        self._cluster: Callable[[], Cluster | None] = lambda: None
        self._counted: Callable[[int, int], None] = lambda written, dropped: None
        self._workers: dict[str, lines.Worker] = {}
        self._workers_written_s = self._failed_s = float("-inf")
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)

    def start(self, cluster: Callable[[], Cluster | None], counted: Callable[[int, int], None]) -> None:
        """Begin to write.

        Args:
            cluster: the newest picture of the workers.
            counted: called with the requests that were written and dropped, from any thread.
        """
        self._cluster, self._counted = cluster, counted
        self._thread.start()

    # ---- the event loop's side -----------------------------------------------------------------------------------

    def generation(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        slo: SLOClass | None,
        max_tokens: int | None,
        priority: int,
        tenant: str | None,
        arrival_s: float,
    ) -> Generations:
        """What is noted of an HTTP request from now on. prompts: token ids of each choice."""
        base = lines.Request(
            request=next(self._numbers),
            arrival_s=self._since(arrival_s),
            input_tokens=None,
            output_tokens=0,
            ended="failed",
            max_tokens=max_tokens,
            slo_class=None if slo is None else slo.name,
            priority=priority,
            tenant=tenant,
        )
        return Generations(self.put, base, prompts, slo)

    def turned_away(self, arrival_s: float, ended: lines.Ended, error: str) -> None:
        """A request that came to its end before its prompt was read."""
        line = lines.Request(
            request=next(self._numbers),
            arrival_s=self._since(arrival_s),
            input_tokens=None,
            output_tokens=0,
            ended=ended,
            missed=ended,
            error=error,
        )
        self.put(line, (), ())

    def put(self, line: lines.Request, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Queue a line; never waits."""
        item = _Item(line, prompt, answer)
        with self._lock:
            fits = not self._closing and self._queued_tokens + item.tokens <= _QUEUED_TOKENS
            if fits:
                try:
                    self._queue.put_nowait(item)
                    self._queued_tokens += item.tokens
                except queue.Full:
                    fits = False
        if not fits:
            self._counted(0, 1)

    def close(self, within_s: float = 0.5) -> None:
        """Write what is left, as far as that takes no longer than `within_s`."""
        with self._lock:
            self._closing = True
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=within_s)
            except queue.Full:
                return
            self._thread.join(within_s)

    def _since(self, at_s: float) -> float:
        return round(max(at_s - self._began_s, 0.0), 6)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        going = True
        while going:
            items, going = next_batch(self._queue, _BATCH, _FLUSH_S)
            self._look_at_workers()
            if items:
                self._write_requests(items)
        if self._workers:
            self._append(self._workers_line(), 0)
        self._files.close()

    def _write_requests(self, items: Sequence[_Item]) -> None:
        size = min((w.block_tokens for w in self._workers.values()), default=_USUAL_BLOCK_TOKENS)
        data = b"".join(lines.encode(self._with_hashes(item, size)) for item in items)
        with self._lock:
            self._queued_tokens -= sum(item.tokens for item in items)
        self._append(data, len(items))

    def _with_hashes(self, item: _Item, size: int) -> lines.Request:
        if len(item.prompt) + len(item.answer) < size:
            return item.line
        ids, full = self.keys.blocks([*item.prompt, *item.answer], size), len(item.prompt) // size
        return replace(item.line, block_tokens=size, hash_ids=ids[:full], answer_hash_ids=ids[full:])

    def _append(self, data: bytes, requests: int) -> None:
        """Write request lines, before them the workers where that is due; on an error drop them, and say so once."""
        now = self._now()
        if self._failing and now - self._failed_s < _RETRY_S:
            self._counted(0, requests)
            return
        try:
            if self._files.is_full(len(data)):
                self._files.next_file()
                self._workers_written_s = float("-inf")
            if requests and self._workers and now - self._workers_written_s >= _WORKERS_EVERY_S:
                self._files.write(self._workers_line())
                self._workers_written_s = now
            self._files.write(data)
        except OSError as error:
            if not self._failing:
                log.error(
                    "cannot write the trace %s: %s; until it can be written, requests are served and not recorded",
                    self._files.path,
                    error.strerror or error,
                )
            self._failing, self._failed_s = True, now
            self._counted(0, requests)
            return
        if self._failing:
            log.warning("the trace %s can be written again", self._files.path)
        self._failing = False
        self._counted(requests, 0)

    def _header(self, part: int) -> bytes:
        c = self._config
        server = lines.Server(
            **{name: getattr(c, name) for name in lines.Server.__struct_fields__ if name != "model"}
            | {"model": c.public_name}
        )
        return lines.encode(
            lines.Header(
                nexusengine_trace=lines.VERSION,
                recording=self._recording,
                part=part,
                opened_s=self._since(self._now()) if part else 0.0,
                started_unix_s=round(self._started_unix_s, 3),
                server=server,
                version=__version__,
                keyed_by="random" if c.record_trace_key is None else "setting",
            )
        )

    def _workers_line(self) -> bytes:
        described = [replace(w, sampled=self.steps.take(name)) for name, w in sorted(self._workers.items())]
        return lines.encode(lines.Workers(at_s=self._since(self._now()), workers=tuple(described)))

    def _look_at_workers(self) -> None:
        """Keep the newest description of every worker, also of those that have ended."""
        cluster = self._cluster()
        for status in cluster.workers if cluster is not None else ():
            if status.load is not None and status.info.block_size:
                self._workers[status.info.worker_id] = _worker(status)


def _worker(status: WorkerStatus) -> lines.Worker:
    info, load = status.info, status.load
    assert load is not None

    def total(name: str) -> float:
        return round(load.counters.get(name, 0.0), 6)

    return lines.Worker(
        worker=info.worker_id,
        device=info.device,
        dtype=info.dtype,
        block_tokens=info.block_size,
        kv_tokens=info.kv_total_blocks * info.block_size,
        max_model_len=info.max_model_len,
        max_batch_tokens=info.max_batch_tokens,
        steps=int(total("steps")),
        learned=None if load.perf is None else lines.Learned.of(load.perf),
        device_s=total("device_s"),
        predicted_s=total("predicted_s"),
        host_s=total("host_s"),
    )
