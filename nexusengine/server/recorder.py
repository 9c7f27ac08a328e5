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
from starlette.requests import Request

from nexusengine import __version__
from nexusengine.config import ServeConfig
from nexusengine.errors import Cancelled, InternalError, NexusError
from nexusengine.obs.logs import get_logger
from nexusengine.recording import format as lines
from nexusengine.recording.files import TraceFiles
from nexusengine.recording.keys import Keys
from nexusengine.server.schemas import Body
from nexusengine.server.step_samples import StepSamples
from nexusengine.slo.classes import SLOClass
from nexusengine.types import SLO, Missed, RequestOutput
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
        steps: samples of the workers' steps.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, config: ServeConfig, now: Callable[[], float] = time.monotonic) -> None:
        assert config.record_trace is not None
        self._config, self._now = config, now
        self._began_s, self._started_unix_s = now(), time.time()
        self._recording = secrets.token_hex(8)
        self._keys = Keys(config.record_trace_key)
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
        return Generations(self, base, prompts, slo)

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

    def tenant(self, api_key: str | None, user: object) -> str | None:
        """The keyed hash of the body's `user`, else of the API key; None if there is neither."""
        if isinstance(user, str) and user:
            return self._keys.tenant("user", user)
        return None if api_key is None else self._keys.tenant("key", api_key)

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
            items: list[_Item] = []
            until_s = time.monotonic() + _FLUSH_S
            while len(items) < _BATCH:
                try:
                    item = self._queue.get(timeout=max(until_s - time.monotonic(), 0.0))
                except queue.Empty:
                    break
                if item is None:
                    going = False
                    break
                items.append(item)
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
        ids, full = self._keys.blocks([*item.prompt, *item.answer], size), len(item.prompt) // size
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
    counted = {name: round(load.counters.get(name, 0.0), 6) for name in ("device_s", "predicted_s", "host_s")}
    return lines.Worker(
        worker=info.worker_id,
        device=info.device,
        dtype=info.dtype,
        block_tokens=info.block_size,
        kv_tokens=info.kv_total_blocks * info.block_size,
        max_model_len=info.max_model_len,
        max_batch_tokens=info.max_batch_tokens,
        steps=int(load.counters.get("steps", 0)),
        learned=None if load.perf is None else lines.Learned.of(load.perf),
        **counted,
    )


class Generations:
    """The choices of one HTTP request, as they are recorded when they end."""

    def __init__(
        self, recorder: Recorder, base: lines.Request, prompts: Sequence[Sequence[int]], slo: SLOClass | None
    ) -> None:
        self._recorder, self._base, self._prompts, self._slo = recorder, base, prompts, slo
        self._answers: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        self._cached = [0] * len(prompts)

    def restarted(self, index: int) -> None:
        """A choice is generated once more: its worker was lost."""
        if index in self._answers:
            self._answers[index] = []

    def output(self, index: int, output: RequestOutput) -> None:
        """A choice goes on."""
        if index in self._answers:
            self._answers[index] += output.token_ids
            self._cached[index] = output.cached_tokens

    def ended(self, index: int, output: RequestOutput, tokens: int) -> None:
        """A choice is complete. tokens: generated, with one that ended it."""
        t, service, verdict = output.timings, output.service, output.verdict
        reason: lines.Ended = "stop" if output.finish_reason == "stop" else "length"
        if output.finish_reason == "abort":
            reason = "left"
        self._put(
            index,
            output_tokens=tokens,
            ended=reason,
            worker=service.worker if service else None,
            preemptions=output.preemptions,
            queue_ms=_ms(t.queue_s if t else None),
            ttft_ms=_ms(t.ttft_s if t else None),
            tpot_ms=_ms(t.tpot_s if t else None),
            e2e_ms=_ms(t.e2e_s if t else None),
            met=verdict.met if verdict else None,
            met_strict=verdict.strict_met if verdict else None,
            missed=verdict.missed if verdict else None,
        )

    def broke_off(self, ended: lines.Ended, error: str | None) -> None:
        """All that are not complete came to no end of their own."""
        missed = None if self._slo is None else "unfinished" if ended == "left" else ended
        met = None if self._slo is None else False
        for index in list(self._answers):
            self._put(
                index,
                output_tokens=len(self._answers[index]),
                ended=ended,
                error=error,
                met=met,
                met_strict=met,
                missed=missed,
            )

    def _put(self, index: int, **fields: object) -> None:
        answer, prompt = self._answers.pop(index), self._prompts[index]
        slo = None if self._slo is None else _bounds(self._slo.slo(len(prompt)))
        line = replace(self._base, input_tokens=len(prompt), slo=slo, cached_tokens=self._cached[index], **fields)
        self._recorder.put(line, prompt, answer)


def error_code(error: Exception) -> str:
    """As the client is told, in OpenAI's form."""
    return error.code if isinstance(error, NexusError) else InternalError.code


def how_ended(missed: Missed, code: str | None) -> lines.Ended:
    """How a request ended that came to no end of its own. code: of its error; None if its client left."""
    if code is None or code == Cancelled.code:
        return "left"
    return missed if missed in ("refused", "unfinished") else "failed"


def tenant_of(request: Request, body: Body, recorder: Recorder | None) -> str | None:
    """The keyed hash of who asks; None where no trace is recorded, or nobody says who asks."""
    if recorder is None:
        return None
    _, _, api_key = request.headers.get("authorization", "").partition(" ")
    return recorder.tenant(api_key.strip() or None, (body.model_extra or {}).get("user"))


def _bounds(slo: SLO) -> lines.Bounds:
    e2e_ms = None if slo.e2e_s is None else round(1e3 * slo.e2e_s, 6)
    return lines.Bounds(ttft_ms=round(1e3 * slo.ttft_s, 6), tpot_ms=round(1e3 * slo.tpot_s, 6), e2e_ms=e2e_ms)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(1e3 * seconds, 0.0), 3)
