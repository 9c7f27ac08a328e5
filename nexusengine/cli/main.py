"""`nexusengine`: picks the command and hands over. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nexusengine import __version__
from nexusengine.errors import NexusError

COMMANDS = {
    "serve": "serve a model over HTTP, on every device there is",
    "bench": "measure throughput and latency",
    "sim": "simulate a server on measured device profiles",
    "plan": "say which mix of devices serves a load, at what cost, and what limits it",
    "profiles": "list device profiles, and make one from a step log",
    "perf": "record step times, and replay them through the performance model",
    "doctor": "say what this machine has, what is used of it, and what would make it faster",
    "explain": "say why a request was served as it was",
    "models": "list the short names of models",
    "config": "print every setting with its default",
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Only the parser of the command that is asked for is filled in."""
    parser = argparse.ArgumentParser(
        prog="nexusengine", description="LLM serving on devices of different kinds, scheduled to keep latency promises."
    )
    parser.add_argument("--version", action="version", version=f"nexusengine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, help in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help)
        if name == chosen:
            importlib.import_module(f"nexusengine.cli.{name}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error that is named on stderr, 2 a wrong command line, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    try:
        return int(importlib.import_module(f"nexusengine.cli.{args.command}").run(args))
    except NexusError as error:
        print(f"nexusengine: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
