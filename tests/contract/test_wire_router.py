"""What router and workers tell each other comes out as it went in, and older shapes of it are understood."""

from __future__ import annotations

import msgspec
import pytest

from nexusengine import wire
from nexusengine.forecast.speed import predictor_of
from nexusengine.kv.digest import BATCHES_REPEATED, MAX_HASHES_IN_BATCH, CacheEvents, DigestSender
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import PerformanceModel
from nexusengine.perf.registry import MODELS, make_model

INFO = wire.WorkerInfo("w0", "e1", 7, "cpu", "m", scheduler="lens", max_waiting=9, block_size=16)


def test_a_report_brings_load_relegated_work_and_the_digest() -> None:
    load = wire.WorkerLoad(
        5,
        tightest_tpot_s=0.05,
        pending=(wire.PendingPrefill(1.5, 10, 2, 0.05, True),),
        pending_tokens=10,
        perf=wire.PerfSnapshot("k", (1.0, 2.0), 1.1, 3, 0),
        relegated=1,
        relegated_tokens=10,
    )
    sent = wire.Report(3, load, wire.PrefixDigest(1, 4, ((b"12345678", b""), (b"", b"87654321"))))
    assert wire.decode_from_worker(wire.encode(sent)) == sent
    assert wire.decode_from_worker(wire.encode(wire.Ready(INFO))) == wire.Ready(INFO)
    assert wire.decode_for_worker(wire.encode(wire.RepeatPrefixes())) == wire.RepeatPrefixes()


def test_reports_and_infos_without_the_newer_parts_are_still_of_this_protocol() -> None:
    report = wire.decode_from_worker(msgspec.msgpack.encode(["Report", 3, [5, 1, 1]]))
    assert isinstance(report, wire.Report)
    assert (report.load.last_dispatch_seq, report.load.waiting, report.load.relegated, report.prefixes) == (
        5,
        1,
        0,
        None,
    )
    ready = wire.decode_from_worker(msgspec.msgpack.encode(["Ready", ["w0", "e1", 7, "cpu", "m"]]))
    assert isinstance(ready, wire.Ready)
    assert (ready.info.scheduler, ready.info.max_waiting) == ("", 0)


def test_the_largest_digest_is_within_its_bound() -> None:
    events = CacheEvents(64)
    for i in range(5 * MAX_HASHES_IN_BATCH):
        events.added(i.to_bytes(16, "little"), 0)
    sender = DigestSender(events)
    for _ in range(1 + BATCHES_REPEATED):
        digest = wire.PrefixDigest(*sender.take())
    size = len(wire.encode(wire.Report(1, wire.WorkerLoad(0), digest)))
    full = len(wire.encode(wire.Report(1, wire.WorkerLoad(0))))
    assert size - full <= wire.MAX_DIGEST_BYTES + 100
    assert size > 30_000


@pytest.mark.parametrize("model", [make_model(name) for name in MODELS])
def test_the_router_can_read_every_model_that_a_worker_may_run(model: PerformanceModel) -> None:
    for tokens in (1, 8, 64, 300):
        model.observe(StepFeatures(tokens, 2, 1, 100.0 * tokens, 50), 0.01 + 1e-5 * tokens)
    s = model.snapshot()
    perf = s
    sent = wire.Report(1, wire.WorkerLoad(0, perf=perf))
    report = wire.decode_from_worker(wire.encode(sent))
    assert isinstance(report, wire.Report)
    step = StepFeatures(200, 3, 1, 5000.0, 900)
    assert predictor_of(report.load.perf).predict(step).mean_s == pytest.approx(model.predict(step).mean_s)
