"""One command that checks everything a GPU is needed for, in under ten minutes: python scripts/gpu_check.py --json OUT

Needs torch, a checkout and some small packages: it says which are missing, and scripts/gpu_wheels.sh collects their
wheels. No network, no weights: models have random weights, transformers is the reference. Every phase runs in a process
of its own, has a time limit, is written to OUT at once, and says pass, fail or skip with a reason; the exit status is 1
if one failed. `--device cpu --tiny` rehearses it. docs/gpus.md says what each phase shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_phases import packages

Findings = dict[str, Any]
_ABOUT_S = 60.0
_AGAIN_S = 20.0
"""A phase that failed is run again only where so much time is left."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal, no figures")
    parser.add_argument("--json", metavar="OUT", help="write findings here after every phase, profiles beside it")
    parser.add_argument("--only", metavar="PHASE,...", help="of the phases in docs/gpus.md")
    parser.add_argument("--limit", type=float, default=570.0, metavar="S", help="seconds for everything")
    parser.add_argument(
        "--wheels", type=Path, default=packages.WHEELS, metavar="FOLDER", help="packages to use where none is installed"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as unpacked:
        wheels = packages.unpack(args.wheels, Path(unpacked))
        if lacking := packages.missing():
            print(f"gpu_check: {packages.sentence(lacking, args.wheels, wheels)}", file=sys.stderr)
            return 2
        return check(args, parser, wheels)


def check(args: argparse.Namespace, parser: argparse.ArgumentParser, wheels: list[str]) -> int:
    """Run the phases; returns the exit status."""
    import torch
    from gpu_phases.apart import run_phase
    from gpu_phases.common import Setting
    from gpu_phases.table import PHASES, about

    ends_s = time.monotonic() + args.limit
    names = args.only.split(",") if args.only else list(PHASES)
    if unknown := [name for name in names if name not in PHASES]:
        parser.error(f"{unknown[0]!r} is no phase; there are {', '.join(PHASES)}")
    at = Setting(torch.device(args.device), args.tiny, Path(args.json) if args.json else None)
    machine = run_phase(about, at, _ABOUT_S, _ABOUT_S)
    found = machine.get("found", {})
    if not found.get("available", True):
        print(
            f"gpu_check: torch {torch.__version__} sees no CUDA device; --device cpu --tiny rehearses", file=sys.stderr
        )
        return 2
    report: Findings = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": found.get("device", args.device),
        "tiny": args.tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "wheels": wheels,
        "doctor": found.get("doctor", machine.get("reason")),
        "phases": {},
    }

    def write() -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1))

    for name in names:
        phase, limit_s = PHASES[name]
        outcome = report["phases"][name] = run_phase(phase, at, limit_s, ends_s - time.monotonic())
        print(f"{outcome['result']:5} {name:20} {outcome['took_s']:7.1f} s  {outcome.get('reason', '')}", flush=True)
        write()
    failed = [name for name in names if report["phases"][name]["result"] == "fail"]
    if at.device.type == "cuda":
        run_again(failed, report["phases"], at, ends_s, write)
    return int(bool(failed))


def run_again(failed: list[str], outcomes: Findings, at: Any, ends_s: float, write: Any) -> None:
    """Phases that failed, once more, each launch waited for: the launch at fault then raises the error itself.

    Args:
        failed: their names.
        outcomes: of all phases by name; that of the second run is put into the first's as `again`.
        at: where.
        ends_s: on time.monotonic: when the whole check has to be over.
        write: called after each.
    """
    from gpu_phases.apart import BLOCKING, run_phase
    from gpu_phases.table import PHASES

    for name in failed:
        left_s = ends_s - time.monotonic()
        if left_s < _AGAIN_S:
            outcomes[name]["again"] = {"result": "skip", "reason": "no time was left"}
            continue
        phase, limit_s = PHASES[name]
        again = outcomes[name]["again"] = run_phase(phase, at, limit_s, left_s, BLOCKING)
        print(
            f"again {name:20} {again['took_s']:7.1f} s  {again['result']} with CUDA_LAUNCH_BLOCKING=1: "
            f"{again.get('reason', '')}",
            flush=True,
        )
        write()


if __name__ == "__main__":
    sys.exit(main())
