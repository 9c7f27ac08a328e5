"""Keeps what a worker has learned of its step times for its next start, in a small file.

A file holds the state of one kind of worker: device, model and how it computes, all of which are written into it too.
It is replaced atomically, by whichever worker of that kind writes last. A file that cannot be read, is not whole, is of
another kind, or says what cannot be, is passed over with a line in the log; one that cannot be written, likewise: the
worker serves as it would without. Nothing of any request is in it.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from nexusengine.cgroup import usable_cpus
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorSpec
from nexusengine.loading.cache import cache_dir
from nexusengine.model_config import ModelConfig
from nexusengine.obs.logs import get_logger
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import Prior
from nexusengine.perf.state import BASIS, ModelState

NONE = "none"
_FOLDER, _SUFFIX = "step-times", ".msgpack"
_PART, _PART_OLD_S = ".part", 3600.0
_MOST_BYTES = 2**20
_DAY_S = 86_400.0
_HALF_LIFE_S = 2 * _DAY_S
_OLDEST_S = 60 * _DAY_S
_FEWEST_STEPS, _EVERY_S, _FIRST_AFTER_S = 32, 30.0, 5.0
log = get_logger("step times")


class SavedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A file.

    Attributes:
        kind: of the worker that wrote it.
        saved_s: when, in seconds since 1970.
    """

    kind: dict[str, str]
    saved_s: Annotated[float, Meta(ge=0.0, le=1e12)]
    state: ModelState


_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(SavedModel)


@dataclass(frozen=True, slots=True)
class Remembered:
    """A state, and how far it is to be believed: 1 for one of just now, half of that every two days."""

    state: ModelState
    freshness: float


class ModelStore:
    """The file of one kind of worker.

    Args:
        folder: made when the first file is written.
        kind: what step times depend on, by name: device, model, types, backend.
        now: seconds since 1970.
    """

    def __init__(self, folder: Path, kind: dict[str, str], now: Callable[[], float] = time.time) -> None:
        name = re.sub(r"[^a-z0-9.]+", "-", kind.get("device", "").lower()).strip("-")[:40]
        digest = hashlib.sha256(msgspec.json.encode(kind, order="sorted")).hexdigest()[:24]
        self.path = folder / f"{name}-{digest}{_SUFFIX}"
        self._kind, self._now = kind, now

    def load(self) -> Remembered | None:
        """What the last worker of this kind had learned; None if there is no such file, or nothing usable in it."""
        self._remove_parts()
        try:
            saved = _DECODER.decode(_read(self.path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.info("%s is passed over: %s", self.path, _why(error))
            return None
        age_s = self._now() - saved.saved_s
        if saved.kind != self._kind or not -_DAY_S <= age_s <= _OLDEST_S:
            cause = "it is of another kind of worker" if saved.kind != self._kind else "it is too old, or of the future"
            log.info("%s is passed over: %s", self.path, cause)
            return None
        return Remembered(saved.state, 0.5 ** (max(age_s, 0.0) / _HALF_LIFE_S))

    def save(self, state: ModelState) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        content = _ENCODER.encode(SavedModel(kind=self._kind, saved_s=self._now(), state=state))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}-{threading.get_ident()}{_PART}")
        try:
            with part.open("xb") as file:
                file.write(content)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        """Remove what processes that were killed while they wrote have left."""
        for part in self.path.parent.glob(f"{self.path.stem}.*{_PART}"):
            try:
                if self._now() - part.stat().st_mtime > _PART_OLD_S:
                    part.unlink()
            except OSError:  # another worker was faster, or the folder is read-only: nothing depends on it
                log.debug("%s is left where it is", part)


class Saver:
    """Writes a model's state from a thread of its own while the model learns: after 5 seconds, then every 30.

    Args:
        timer: seconds of any clock that does not go back.
    """

    def __init__(self, store: ModelStore, model: OnlineModel, timer: Callable[[], float] = time.monotonic) -> None:
        self._store, self._model, self._timer = store, model, timer
        self._next_s, self._saved_steps = timer() + _FIRST_AFTER_S, 0
        self._states: queue.Queue[ModelState] = queue.Queue(1)
        self._thread: threading.Thread | None = None
        self._failed = False

    def tick(self) -> None:
        """Hand the state over if it is time to. From the thread that the model learns in; never waits."""
        now = self._timer()
        if now < self._next_s or self._failed:
            return
        self._next_s = now + _EVERY_S
        if self._model.steps - self._saved_steps < _FEWEST_STEPS or self._states.full():
            return
        self._saved_steps = self._model.steps
        self._states.put_nowait(self._model.state())
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="step times", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._failed:
            state = self._states.get()
            try:
                self._store.save(state)
            except OSError as error:
                self._failed = True
                log.warning(
                    "cannot keep step times in %s: %s; the next start learns them anew", self._store.path, _why(error)
                )


def folder_of(setting: str | None) -> Path | None:
    """The folder that the setting `step_times` names; None if nothing is to be kept, or there is no home folder.

    Raises:
        ConfigError: it begins with the home folder of a user who is not known.
    """
    if setting == NONE:
        return None
    try:
        return Path(setting).expanduser() if setting else cache_dir() / _FOLDER
    except RuntimeError:
        raise ConfigError(
            f"step_times is {setting!r}, and that user's home folder is not known; name a whole path, or none",
            param="step_times",
        ) from None
    except ConfigError:
        log.info("there is no home folder to keep step times in; --step-times names another")
        return None


def _read(path: Path) -> bytes:
    """The content of a regular file of reasonable size; a pipe there would never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError("it is no file of this kind")
        return file.read(_MOST_BYTES)


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def kind_of(spec: ExecutorSpec, geometry: ModelConfig | None, prior: Prior, *, eager: bool) -> dict[str, str]:
    """What step times depend on, so that workers of one kind, and no others, share a file.

    Args:
        geometry: of the model.
        prior: what the state is relative to.
        eager: decode steps run without CUDA graphs.
    """
    on_cpu = spec.device.partition(":")[0] == "cpu"
    return {
        "device": f"{processor()} {spec.device}" if on_cpu else spec.device_name or spec.device,
        "cores": str(usable_cpus()) if on_cpu else "",
        "model": repr(geometry and _shape(geometry)),
        "weights": f"{spec.dtype} {spec.weights_bytes} {geometry.stored if geometry else None}",
        "kv": f"{spec.kv_dtype or spec.dtype} {spec.block_size}",
        "backend": f"{spec.attention_backend} {'eager' if eager else ''} {'overlaps' if spec.overlaps else ''}",
        "basis": BASIS,
        "prior": f"{sum(prior.seconds):.9g}",
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the kernel calls the processor; "cpu" where it does not say."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or "cpu"


def _shape(g: ModelConfig) -> tuple[object, ...]:
    sizes = g.num_layers, g.hidden_size, g.intermediate_size, g.num_heads, g.num_kv_heads, g.head_dim, g.vocab_size
    return (g.architecture, *sizes, g.tie_embeddings, g.sliding_window)
