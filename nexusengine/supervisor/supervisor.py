"""Starts router, server and workers, restarts what dies, drains, and leaves nothing behind.

Runs in one thread: the caller's in `nexusengine serve`, a background one under `Engine(devices=[...])`. Everything that
happens reaches it as an event in one queue.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nexusengine import native
from nexusengine.config import DeviceSpec, ServeConfig, parse_devices
from nexusengine.errors import NexusError, Unavailable
from nexusengine.loading.resolve import ModelFiles, resolve_model
from nexusengine.nvml import Gpu, visible
from nexusengine.obs.logs import get_logger
from nexusengine.process.child import Child, Message
from nexusengine.router.placement.registry import make_policy
from nexusengine.slo.resolve import SLOClasses
from nexusengine.supervisor.cores import numa_nodes, place_workers
from nexusengine.supervisor.runtime_dir import RuntimeDir
from nexusengine.worker.gpu import PINNED

_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0
_RESTARTS_COUNTED_S = 300.0
_LAST_WORDS_S = 5.0
_TERMINATE_S = 1.5
_SAME_SIGNAL_S = 1.0
log = get_logger("supervisor")


class Failed(NexusError):
    """Something that cannot be repaired by a restart; serving ends."""

    code = "serve_failed"


@dataclass(slots=True)
class _Role:
    """One process that should be running. key: "router", "server", or the worker's id.

    epoch: of the worker process that runs, or is started next. failing_since_s: when it said that it failed; it is to
    end by itself. waiting_since_s: since when it has had all that it needs to become ready.
    """

    key: str
    module: str
    config: Callable[[], Message]
    environ: dict[str, str] = field(default_factory=dict)
    child: Child | None = None
    epoch: str = ""
    was_ready: bool = False
    waiting_since_s: float | None = None
    failing_since_s: float | None = None
    start_again_s: float | None = None
    restarts: list[float] = field(default_factory=list)


class Supervisor:
    """on_event is called, in the supervisor's thread, with {"type": "phase", "phase", "fraction"}, {"type":
    "listening", "host", "port"}, {"type": "ready"} once all processes are, {"type": "draining", "limit_s"}, and
    {"type": "exit", "name", "cause"}.

    Raises ConfigError for devices or policies that do not exist or a runtime folder that cannot be used, before
    anything is started.
    """

    def __init__(
        self, config: ServeConfig, *, with_server: bool, on_event: Callable[[Message], None] = lambda event: None
    ) -> None:
        from nexusengine.scheduler.registry import make_policy as make_scheduler

        make_policy(config.router)
        make_scheduler(config.scheduler)
        SLOClasses.configured(config.slo_classes, config.default_slo_class)
        self.devices = parse_devices(config.devices)
        self.config = config
        self._on_event = on_event
        self._events: queue.SimpleQueue[tuple[Child | None, Message]] = queue.SimpleQueue()
        self._runtime = RuntimeDir(config.runtime_dir)
        self.front = f"ipc://{self._runtime.path}/front"
        self._back = f"ipc://{self._runtime.path}/back"
        self._files: ModelFiles | None = None
        self._port = config.port
        self._draining_since_s: float | None = None
        self._lost_while_draining: str | None = None
        self._stop_now = False
        self._ready_said = False
        self._compiling: Message | None = None
        names = [{"worker_id": f"w{i}", "device": str(d)} for i, d in enumerate(self.devices)]
        cores = _cores(self.devices)
        common: Message = {"config": dataclasses.asdict(config), "front": self.front, "back": self._back}
        inside: Message = {
            **common,
            "hash_key": secrets.token_hex(16),
        }  # workers' and router's names of KV blocks agree
        self._roles = {
            "router": _Role("router", "nexusengine.router.broker", lambda: {**inside, "workers": expected()})
        }

        def expected() -> list[Message]:
            """The worker processes that the router may take."""
            return [{**name, "epoch": self._roles[name["worker_id"]].epoch} for name in names]

        if with_server:
            # started again, it takes the port it had, also where 0 was asked for
            self._roles["server"] = _Role(
                "server",
                "nexusengine.server.main",
                lambda: {**common, "config": {**common["config"], "port": self._port}},
            )
        gpus = visible() if any(d.kind == "cuda" for d in self.devices) else ()
        for name, device in zip(names, self.devices, strict=True):
            role = _Role(name["worker_id"], "nexusengine.worker.worker", dict, worker_environ(device, gpus))
            role.epoch = _new_epoch()
            role.config = lambda role=role, name=name: {  # type: ignore[misc]
                **inside,
                **name,
                "cores": cores.get(name["worker_id"], ()),
                "epoch": role.epoch,
                "model_path": str(self._files.path) if self._files else "",
            }
            self._roles[name["worker_id"]] = role

    # ---- from any thread -----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new requests, finish those that run within drain_timeout, then end; end now if no worker was ready
        yet. Asked again after a second or more: end now (some send their signal twice)."""
        self._events.put((None, {"type": "drain", "at_s": time.monotonic()}))

    def stop(self) -> None:
        """End now."""
        self._events.put((None, {"type": "stop"}))

    def forget_children(self) -> None:
        """In a fork of this process: let go of their stdin, whose end is what tells them that their parent is gone."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for role in self._roles.values():
            stdin = role.child.process.stdin if role.child is not None else None
            if stdin is not None and not stdin.closed:
                os.dup2(nowhere, stdin.fileno(), inheritable=False)
        os.close(nowhere)

    # ---- in the supervisor's thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until drained or stopped. Raises NexusError with the cause when it cannot go on; by the time this
        returns or raises, every child has ended."""
        try:
            for role in self._roles.values():  # workers import what they need while the model is looked for
                self._start(role)
            threading.Thread(target=self._resolve, daemon=True, name="resolve model").start()
            if any(d.kind == "cpu" for d in self.devices):
                threading.Thread(target=self._compile, daemon=True, name="compile kernels").start()
            while not self._stop_now:
                self._turn()
        finally:
            self._end_all()
        if self._lost_while_draining is not None:
            raise Failed(self._lost_while_draining)

    def _turn(self) -> None:
        now = time.monotonic()
        waits = [0.5, *(r.start_again_s - now for r in self._roles.values() if r.start_again_s is not None)]
        try:
            source, event = self._events.get(timeout=max(min(waits), 0.01))
        except queue.Empty:
            pass
        else:
            self._handle(source, event)
        now = time.monotonic()
        for role in self._roles.values():
            if role.start_again_s is not None and role.start_again_s <= now:
                self._start(role)
            self._check_progress(role, now)
        if self._draining_since_s is not None and now - self._draining_since_s >= self.config.drain_timeout:
            log.warning("requests were still running when the drain time was over")
            self._stop_now = True

    def _check_progress(self, role: _Role, now: float) -> None:
        """Raises Failed if it does not get ready."""
        if role.child is None:
            return
        waiting = role.waiting_since_s is not None and not role.was_ready
        if waiting and now - role.waiting_since_s > self.config.start_timeout:  # type: ignore[operator]
            raise Failed(f"{role.key} was not ready within {self.config.start_timeout} s")
        if role.failing_since_s is not None and now - role.failing_since_s > _LAST_WORDS_S:
            role.child.kill()

    def _handle(self, source: Child | None, event: Message) -> None:
        kind = event["type"]
        if source is None:
            self._handle_own(kind, event)
            return
        role = next((r for r in self._roles.values() if r.child is source), None)
        if role is None:
            return
        if kind == "exit":
            self._on_exit(role, event)
        elif kind == "ready":
            role.was_ready = True
            if not self._ready_said and all(r.was_ready for r in self._roles.values()):
                self._ready_said = True
                self._on_event({"type": "ready"})
        elif kind == "listening" and role.key == "router":
            role.was_ready = True
        elif kind == "listening":
            self._port = event["port"]
            self._on_event(event)
        elif kind == "failed":
            role.failing_since_s = time.monotonic()
        elif kind == "phase" and event["fraction"] < 1.0 and self._files and role is self._first_to_load():
            self._on_event({**event, "phase": f"{event['phase']} ({role.key})"})
        elif kind == "drained":  # the server, once every answer is written; the router may be done before that
            self._stop_now = True

    def _handle_own(self, kind: str, event: Message) -> None:
        if kind == "stop":
            self._stop_now = True
        elif kind == "drain" and self._draining_since_s is not None:
            self._stop_now |= event["at_s"] - self._draining_since_s > _SAME_SIGNAL_S
        elif kind == "drain":
            self._draining_since_s = event["at_s"]
            if not any(self._is_worker(role) and role.was_ready for role in self._roles.values()):
                self._stop_now = True  # no request can have begun
                return
            self._on_event({"type": "draining", "limit_s": self.config.drain_timeout})
            for key in ("server", "router"):
                if (role := self._roles.get(key)) and role.child:
                    role.child.send({"type": "drain"})
        elif kind == "phase":
            self._on_event(event)
            self._tell_server(event)
        elif kind == "compiling":
            self._compiling = {**event, "type": "phase"}
            if self._files is not None:  # until then there is more to wait for
                self._handle_own("phase", self._compiling)
        elif kind == "resolved":
            self._files = event["files"]
            for role in self._roles.values():
                role.waiting_since_s = role.waiting_since_s or time.monotonic()
            self._tell_server(self._model_message())
            if self._compiling is not None and self._compiling["fraction"] < 1.0:
                self._handle_own("phase", self._compiling)
            for role in self._roles.values():
                if self._is_worker(role) and role.child is not None:
                    role.child.send({"type": "model", "path": str(self._files.path)})
        elif kind == "failed":
            raise event["error"]

    def _on_exit(self, role: _Role, event: Message) -> None:
        cause = event["cause"]
        role.child = None
        self._on_event({"type": "exit", "name": role.key, "cause": cause})
        if self._draining_since_s is not None:
            self._on_lost_while_draining(role, event["code"], cause)
            if not (self._is_worker(role) and role.was_ready):
                return
        if not role.was_ready:
            raise Failed(cause if event["code"] == 1 else f"{role.key} did not start: {cause}")
        now = time.monotonic()
        role.restarts = [t for t in role.restarts if now - t < _RESTARTS_COUNTED_S] + [now]
        if len(role.restarts) > self.config.max_restarts:
            raise Failed(f"{role.key} ended {len(role.restarts)} times within five minutes; the last time: {cause}")
        back_off_s = min(_FIRST_BACK_OFF_S * 2 ** (len(role.restarts) - 1), _LONGEST_BACK_OFF_S)
        role.start_again_s = now + back_off_s
        log.warning("%s ended (%s); starting it again in %.1f s", role.key, cause, back_off_s)
        if self._is_worker(role):
            message = {"worker_id": role.key, "epoch": role.epoch, "cause": cause, "restarts": len(role.restarts)}
            role.epoch = _new_epoch()
            if (router := self._roles["router"]).child:
                router.child.send({"type": "worker_exited", **message, "next_epoch": role.epoch})

    def _on_lost_while_draining(self, role: _Role, code: int, cause: str) -> None:
        """The drain goes on as long as somebody can finish a request and somebody can be told: a worker is started
        again; without router or server nothing is left to wait for but the errors that the server sends."""
        if role.was_ready or not _told_to_end(code):
            self._lose_while_draining(role.key, cause)
        others = [r for r in self._roles.values() if self._is_worker(r) and r is not role]
        if not self._is_worker(role):
            self._stop_now = True
        elif not role.was_ready:
            self._stop_now |= not any(r.child is not None or r.start_again_s is not None for r in others)

    def _lose_while_draining(self, name: str, cause: str) -> None:
        self._lost_while_draining = f"{name} ended while the last requests were being finished: {cause}"
        log.error(self._lost_while_draining)

    def _start(self, role: _Role) -> None:
        role.start_again_s = role.failing_since_s = None
        role.waiting_since_s = time.monotonic() if role.key == "router" or self._files is not None else None
        role.child = Child(
            role.key,
            role.module,
            role.config(),
            lambda child, event: self._events.put((child, event)),
            environ=role.environ,
        )
        if role.key == "server" and self._files is not None:
            role.child.send(self._model_message())
        if self._draining_since_s is not None and not self._is_worker(role):
            role.child.send({"type": "drain"})  # it was being started again when the others were told

    def _resolve(self) -> None:
        """Find or download the model; in a thread of its own, because it can take long."""

        def progress(phase: str, fraction: float) -> None:
            self._events.put((None, {"type": "phase", "phase": phase, "fraction": fraction}))

        weights = any(d.kind != "emulated" for d in self.devices)
        try:
            progress("looking for the model", 0.0)
            files = resolve_model(self.config.model, revision=self.config.revision, weights=weights, progress=progress)
            progress("starting workers", 0.0)
            self._events.put((None, {"type": "resolved", "files": files}))
        except NexusError as error:
            self._events.put((None, {"type": "failed", "error": error}))
        except Exception as error:  # a bug, but the user must not wait for ever because of it
            log.exception("resolving the model failed")
            failed = Failed(f"cannot load model {self.config.model!r}: {error}")
            self._events.put((None, {"type": "failed", "error": failed}))

    def _compile(self) -> None:
        """Compile the CPU kernels, if need be, while the model is looked for and workers import torch. A worker that is
        there first waits for it."""

        def progress(phase: str, fraction: float) -> None:
            self._events.put((None, {"type": "compiling", "phase": phase, "fraction": fraction}))

        native.prepare(progress)

    def _tell_server(self, message: Message) -> None:
        if (role := self._roles.get("server")) and role.child:
            role.child.send(message)

    def _model_message(self) -> Message:
        if self._files is None:
            raise Unavailable("the model is not known yet")
        name = self.config.served_model_name or self.config.model
        return {"type": "model_ready", "path": str(self._files.path), "name": name}

    def _first_to_load(self) -> _Role | None:
        """The worker whose progress is shown; the others load beside it."""
        return next((r for r in self._roles.values() if self._is_worker(r) and not r.was_ready), None)

    @staticmethod
    def _is_worker(role: _Role) -> bool:
        return role.key.startswith("w")

    def _end_all(self) -> None:
        """First the server, which gets time to write its last words; then the others; then the runtime folder."""
        left = {key: role.child for key, role in self._roles.items() if role.child is not None}
        server = [left.pop("server")] if "server" in left else []
        for group, limit_s in ((server, _LAST_WORDS_S), (list(left.values()), _TERMINATE_S)):
            for one in group:
                one.close()
            until_s = time.monotonic() + limit_s
            while any(c.process.poll() is None for c in group) and time.monotonic() < until_s:
                time.sleep(0.02)
            for one in group:
                if one.process.poll() is None:
                    one.kill()
                    one.process.wait()
                elif self._draining_since_s is not None and _killed(one.process.returncode):
                    self._lose_while_draining(one.name, f"killed by {signal.Signals(-one.process.returncode).name}")
        self._runtime.close()


def _killed(code: int) -> bool:
    """Whether this exit status is of a signal, other than the SIGTERM or Ctrl-C that everybody gets."""
    return code < 0 and not _told_to_end(code)


def _told_to_end(code: int) -> bool:
    """Whether this exit status is of SIGTERM or Ctrl-C, as everybody gets; children that start do not ignore it yet."""
    return code in (-signal.SIGTERM, -signal.SIGINT)


def _new_epoch() -> str:
    return secrets.token_hex(4)


def worker_environ(device: DeviceSpec, gpus: tuple[Gpu, ...]) -> dict[str, str]:
    """What has to be known before torch is imported. A CPU worker: its thread count, and that torch does not spin
    after computing, beside the kernels. A GPU's: that GPU alone, by its UUID, so that nothing depends
    on the order in which libraries count them; there it is device 0. gpus: by index; where the driver does not show the
    device, the worker sees them all and says itself what is wrong."""
    if device.kind == "cpu":
        count = {"OMP_NUM_THREADS": str(device.threads)} if device.threads else {}
        return count if "OMP_WAIT_POLICY" in os.environ else count | {"OMP_WAIT_POLICY": "passive"}
    if device.kind == "cuda" and (device.index or 0) < len(gpus):
        return {"CUDA_VISIBLE_DEVICES": gpus[device.index or 0].uuid, PINNED: "1"}
    return {}


def _cores(devices: Sequence[DeviceSpec]) -> dict[str, tuple[int, ...]]:
    """The cores of each CPU worker that is tied to some, by its id."""
    workers = [i for i, device in enumerate(devices) if device.kind == "cpu"]
    placed = place_workers([devices[i].threads for i in workers], sorted(os.sched_getaffinity(0)), numa_nodes())
    return {f"w{i}": cores for i, cores in zip(workers, placed, strict=True) if cores}
