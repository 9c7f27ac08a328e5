"""Starts router, server and workers, restarts what dies, drains, and leaves nothing behind.

Runs in one thread: the caller's in `nexusengine serve`, a background one under `Engine(devices=[...])`. Everything that
happens reaches it as an event in one queue.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from nexusengine import native
from nexusengine.config import ServeConfig, parse_devices
from nexusengine.errors import NexusError, Unavailable
from nexusengine.loading.resolve import ModelFiles, resolve_model
from nexusengine.nvml import visible
from nexusengine.obs.logs import get_logger
from nexusengine.process import control
from nexusengine.process.child import Child, Exited
from nexusengine.router.placement.registry import make_policy
from nexusengine.slo.resolve import SLOClasses
from nexusengine.supervisor.events import (
    Compiling,
    Draining,
    DrainRequested,
    Event,
    Listening,
    OwnEvent,
    Phase,
    ProcessEnded,
    Ready,
    Resolved,
    ResolveFailed,
    StopRequested,
)
from nexusengine.supervisor.roles import Role, RoleKind, worker_cores, worker_environ
from nexusengine.supervisor.runtime_dir import RuntimeDir

_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0
_RESTARTS_COUNTED_S = 300.0
_LAST_WORDS_S = 5.0
_TERMINATE_S = 1.5
_SAME_SIGNAL_S = 1.0
log = get_logger("supervisor")


class Failed(NexusError):
    """Something that cannot be repaired by a restart; serving ends."""

    code = "serve_failed"


class Supervisor:
    """Keeps the processes of one engine running.

    Args:
        with_server: whether there is an HTTP server among them.
        on_event: called in the supervisor's thread.

    Raises:
        ConfigError: for devices or policies that do not exist or a runtime folder that cannot be used, before anything
            is started.
    """

    def __init__(
        self, config: ServeConfig, *, with_server: bool, on_event: Callable[[Event], None] = lambda event: None
    ) -> None:
        from nexusengine.scheduler.registry import make_policy as make_scheduler

        make_policy(config.router)
        make_scheduler(config.scheduler)
        SLOClasses.configured(config.slo_classes, config.default_slo_class)
        self.devices = parse_devices(config.devices)
        self.config = config
        self._on_event = on_event
        self._events: queue.SimpleQueue[tuple[Child, control.FromChild | Exited] | tuple[None, OwnEvent]]
        self._events = queue.SimpleQueue()
        self._runtime = RuntimeDir(config.runtime_dir)
        self.front = f"ipc://{self._runtime.path}/front"
        self._back = f"ipc://{self._runtime.path}/back"
        self._hash_key = secrets.token_hex(16)  # workers' and router's hashes of KV blocks agree
        self._files: ModelFiles | None = None
        self._port = config.port
        self._draining_since_s: float | None = None
        self._lost_while_draining: str | None = None
        self._stop_now = False
        self._ready_said = False
        self._compiling: Phase | None = None
        self._cores = worker_cores(self.devices)
        gpus = visible() if any(d.kind == "cuda" for d in self.devices) else ()
        roles = [Role(RoleKind.ROUTER, "router", self._router_boot)]
        if with_server:
            roles.append(Role(RoleKind.SERVER, "server", self._server_boot))
        for i, device in enumerate(self.devices):
            boot, environ = partial(self._worker_boot, i), worker_environ(device, gpus)
            roles.append(Role(RoleKind.WORKER, f"w{i}", boot, environ, epoch=_new_epoch()))
        self._roles = {role.name: role for role in roles}

    def _router_boot(self) -> control.RouterBoot:
        workers = tuple(self._identity(i) for i in range(len(self.devices)))
        return control.RouterBoot(self.config, self.front, self._back, self._hash_key, workers)

    def _server_boot(self) -> control.ServerBoot:
        """Started again, it takes the port it had, also where 0 was asked for."""
        return control.ServerBoot(replace(self.config, port=self._port), self.front)

    def _worker_boot(self, i: int) -> control.WorkerBoot:
        path = str(self._files.path) if self._files else ""
        cores = self._cores.get(f"w{i}", ())
        return control.WorkerBoot(self.config, self._back, self._hash_key, self._identity(i), cores, path)

    def _identity(self, i: int) -> control.WorkerIdentity:
        """The process of a worker that runs, or is started next."""
        return control.WorkerIdentity(f"w{i}", str(self.devices[i]), self._roles[f"w{i}"].epoch)

    # ---- from any thread -----------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new requests, finish those that run within drain_timeout, then end.

        Ends now if no worker was ready yet, or when asked again after a second or more (some send their signal twice).
        """
        self._events.put((None, DrainRequested(time.monotonic())))

    def stop(self) -> None:
        """End now."""
        self._events.put((None, StopRequested()))

    def forget_children(self) -> None:
        """In a fork of this process: close their stdin, whose end shows them that their parent is gone."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for role in self._roles.values():
            stdin = role.child.process.stdin if role.child is not None else None
            if stdin is not None and not stdin.closed:
                os.dup2(nowhere, stdin.fileno(), inheritable=False)
        os.close(nowhere)

    # ---- in the supervisor's thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until drained or stopped; at the end every child has ended.

        Raises:
            NexusError: it cannot go on, with the cause.
        """
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
            happened = self._events.get(timeout=max(min(waits), 0.01))
        except queue.Empty:
            pass
        else:
            self._handle(*happened)
        now = time.monotonic()
        for role in self._roles.values():
            if role.start_again_s is not None and role.start_again_s <= now:
                self._start(role)
            self._check_progress(role, now)
        if self._draining_since_s is not None and now - self._draining_since_s >= self.config.drain_timeout:
            log.warning("requests were still running when the drain time was over")
            self._stop_now = True

    def _check_progress(self, role: Role, now: float) -> None:
        """Raises Failed if it does not get ready."""
        if role.child is None:
            return
        waiting = role.waiting_since_s is not None and not role.was_ready
        if waiting and now - role.waiting_since_s > self.config.start_timeout:  # type: ignore[operator]
            raise Failed(f"{role.name} was not ready within {self.config.start_timeout} s")
        if role.failing_since_s is not None and now - role.failing_since_s > _LAST_WORDS_S:
            role.child.kill()

    def _handle(self, source: Child | None, event: control.FromChild | Exited | OwnEvent) -> None:
        if source is None:
            self._handle_own(event)  # type: ignore[arg-type]  # without a source, an event is our own
        elif (role := next((r for r in self._roles.values() if r.child is source), None)) is not None:
            self._handle_process(role, event)  # type: ignore[arg-type]

    def _handle_process(self, role: Role, event: control.FromChild | Exited) -> None:
        match event:
            case Exited():
                self._on_exit(role, event)
            case Ready():
                role.was_ready = True
                if not self._ready_said and all(r.was_ready for r in self._roles.values()):
                    self._ready_said = True
                    self._on_event(event)
            case Listening() if role.kind is RoleKind.ROUTER:
                role.was_ready = True
            case Listening():
                self._port = event.port
                self._on_event(event)
            case control.Failed():
                role.failing_since_s = time.monotonic()
            case Phase():
                if event.fraction < 1.0 and self._files and role is self._first_to_load():
                    self._on_event(Phase(f"{event.phase} ({role.name})", event.fraction))
            case control.Drained():  # the server, once every reply is written; the router may be done before that
                self._stop_now = True

    def _handle_own(self, event: OwnEvent) -> None:
        match event:
            case StopRequested():
                self._stop_now = True
            case DrainRequested():
                self._on_drain(event)
            case Phase():
                self._on_event(event)
                self._send_server(event)
            case Compiling():
                self._compiling = event.phase
                if self._files is not None:  # until then there is more to wait for
                    self._handle_own(event.phase)
            case Resolved():
                self._on_resolved(event.files)
            case ResolveFailed():
                raise event.error

    def _on_drain(self, event: DrainRequested) -> None:
        if self._draining_since_s is not None:
            self._stop_now |= event.at_s - self._draining_since_s > _SAME_SIGNAL_S
            return
        self._draining_since_s = event.at_s
        if not any(role.is_worker and role.was_ready for role in self._roles.values()):
            self._stop_now = True  # no request can have begun
            return
        self._on_event(Draining(self.config.drain_timeout))
        self._send_server(control.Drain())
        self._roles["router"].send(control.Drain())

    def _on_resolved(self, files: ModelFiles) -> None:
        self._files = files
        for role in self._roles.values():
            role.waiting_since_s = role.waiting_since_s or time.monotonic()
        self._send_server(self._model())
        if self._compiling is not None and self._compiling.fraction < 1.0:
            self._handle_own(self._compiling)
        for role in self._roles.values():
            if role.is_worker:
                role.send(self._model())

    def _on_exit(self, role: Role, exited: Exited) -> None:
        cause = exited.cause
        role.child = None
        self._on_event(ProcessEnded(role.name, cause))
        if self._draining_since_s is not None:
            self._on_lost_while_draining(role, exited.code, cause)
            if not (role.is_worker and role.was_ready):
                return
        if not role.was_ready:
            raise Failed(cause if exited.code == 1 else f"{role.name} did not start: {cause}")
        now = time.monotonic()
        role.restarts = [t for t in role.restarts if now - t < _RESTARTS_COUNTED_S] + [now]
        if len(role.restarts) > self.config.max_restarts:
            raise Failed(f"{role.name} ended {len(role.restarts)} times within five minutes; the last time: {cause}")
        back_off_s = min(_FIRST_BACK_OFF_S * 2 ** (len(role.restarts) - 1), _LONGEST_BACK_OFF_S)
        role.start_again_s = now + back_off_s
        log.warning("%s ended (%s); starting it again in %.1f s", role.name, cause, back_off_s)
        if role.is_worker:
            ended, role.epoch = role.epoch, _new_epoch()
            message = control.WorkerExited(role.name, ended, role.epoch, cause, len(role.restarts))
            self._roles["router"].send(message)

    def _on_lost_while_draining(self, role: Role, code: int, cause: str) -> None:
        """Decide whether the drain goes on: as long as some worker can finish requests and their replies can be sent.

        A worker is started again; without router or server only the errors that the server sends are left.
        """
        if role.was_ready or not _asked_to_end(code):
            self._lose_while_draining(role.name, cause)
        others = [r for r in self._roles.values() if r.is_worker and r is not role]
        if not role.is_worker:
            self._stop_now = True
        elif not role.was_ready:
            self._stop_now |= not any(r.child is not None or r.start_again_s is not None for r in others)

    def _lose_while_draining(self, name: str, cause: str) -> None:
        self._lost_while_draining = f"{name} ended while the last requests were being finished: {cause}"
        log.error(self._lost_while_draining)

    def _start(self, role: Role) -> None:
        role.start_again_s = role.failing_since_s = None
        has_all = role.kind is RoleKind.ROUTER or self._files is not None
        role.waiting_since_s = time.monotonic() if has_all else None
        role.child = Child(
            role.name,
            role.module,
            role.boot(),
            lambda child, event: self._events.put((child, event)),
            environ=role.environ,
        )
        if role.kind is RoleKind.SERVER and self._files is not None:
            role.send(self._model())
        if self._draining_since_s is not None and not role.is_worker:
            role.send(control.Drain())  # it was being started again when it was sent to the others

    def _resolve(self) -> None:
        """Find or download the model; in a thread of its own, because it can take long."""

        def progress(phase: str, fraction: float) -> None:
            self._events.put((None, Phase(phase, fraction)))

        weights = any(d.kind != "emulated" for d in self.devices)
        try:
            progress("looking for the model", 0.0)
            files = resolve_model(self.config.model, revision=self.config.revision, weights=weights, progress=progress)
            progress("starting workers", 0.0)
            self._events.put((None, Resolved(files)))
        except NexusError as error:
            self._events.put((None, ResolveFailed(error)))
        except Exception as error:  # a bug, but the user must not wait for ever because of it
            log.exception("resolving the model failed")
            failed = Failed(f"cannot load model {self.config.model!r}: {error}")
            self._events.put((None, ResolveFailed(failed)))

    def _compile(self) -> None:
        """Compile the CPU kernels, if need be, while the model is looked for and workers import torch.

        A worker that is there first waits for it.
        """

        def progress(phase: str, fraction: float) -> None:
            self._events.put((None, Compiling(Phase(phase, fraction))))

        native.prepare(progress)

    def _send_server(self, message: control.ToChild) -> None:
        if (role := self._roles.get("server")) is not None:
            role.send(message)

    def _model(self) -> control.Model:
        if self._files is None:
            raise Unavailable("the model is not known yet")
        return control.Model(str(self._files.path), self.config.public_name)

    def _first_to_load(self) -> Role | None:
        """The worker whose progress is shown; the others load beside it."""
        return next((r for r in self._roles.values() if r.is_worker and not r.was_ready), None)

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
    return code < 0 and not _asked_to_end(code)


def _asked_to_end(code: int) -> bool:
    """Whether this exit status is of SIGTERM or Ctrl-C, as everybody gets; children that start do not ignore it yet."""
    return code in (-signal.SIGTERM, -signal.SIGINT)


def _new_epoch() -> str:
    return secrets.token_hex(4)
