"""`nexusengine serve`: an OpenAI-compatible server in front of every device."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import time

from nexusengine.config import ServeConfig, load
from nexusengine.config import add_arguments as add_settings
from nexusengine.obs.console import end_progress, on_terminal, write_line, write_progress
from nexusengine.supervisor.events import Draining, Event, Listening, Phase, Ready


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    add_settings(parser, ServeConfig)


def run(args: argparse.Namespace) -> int:
    config = load(ServeConfig, vars(args), toml_file=args.config)

    from nexusengine.obs.logs import setup
    from nexusengine.supervisor.supervisor import Supervisor

    setup(config.log_level)
    announcer = Announcer(config)
    supervisor = Supervisor(config, with_server=True, on_event=announcer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.drain())
    try:
        supervisor.run()
    finally:
        end_progress()
    return 0


class Announcer:
    """Says on stderr what start-up is doing, and at its end on stdout where the server is."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._started_s = time.monotonic()
        self._url = ""
        self._phase = ""

    def __call__(self, event: Event) -> None:
        match event:
            case Phase():
                self._show(event.phase, event.fraction)
            case Listening():
                host = "127.0.0.1" if event.host in ("0.0.0.0", "::") else event.host
                self._url = f"http://[{host}]:{event.port}" if ":" in host else f"http://{host}:{event.port}"
                self._show(f"listening at {self._url}, not ready yet", 0.0)
            case Ready():
                end_progress()
                print(self._greeting(), flush=True)
            case Draining():
                limit = f"for {event.limit_s:g} s at most"
                self._show(f"finishing the requests in progress, {limit}; a second Ctrl-C or SIGTERM ends at once", 0.0)

    def _show(self, phase: str, fraction: float) -> None:
        """A line for each phase; on a terminal its percentage is written over."""
        line = f"==> {phase}" + (f" {100 * fraction:.0f} %" if 0 < fraction < 1 else "")
        if phase != self._phase:
            end_progress()
        if on_terminal():
            write_progress(line)
        elif phase != self._phase:
            write_line(line)
        self._phase = phase

    def _greeting(self) -> str:
        name = self._config.public_name
        message = {"role": "user", "content": "What is the capital of France?"}
        body = shlex.quote(json.dumps({"model": name, "messages": [message]}))
        header = ' -H "Authorization: Bearer $API_KEY"' if self._config.api_key else ""
        took_s = time.monotonic() - self._started_s
        return (
            f"\nnexusengine serves {name} at {self._url} (ready after {took_s:.1f} s). Try:\n\n"
            f"curl {self._url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {body}\n"
        )
