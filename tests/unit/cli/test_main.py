"""The command line: help without weight, errors without tracebacks, documents that agree with the code."""

import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nexusengine.cli.main import COMMANDS, main
from nexusengine.cli.serve import Announcer
from nexusengine.config import ServeConfig
from nexusengine.obs.console import Handler, end_progress, write_line
from nexusengine.supervisor.events import Draining, Listening, Phase, Ready

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert COMMANDS[command] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import nexusengine", ["torch", "numpy", "msgspec"]),
        ("from nexusengine import Engine, SamplingParams", ["torch", "starlette"]),
        ("import nexusengine.server.app", ["torch"]),
        ("import nexusengine.router.broker", ["torch", "starlette", "tokenizers"]),
        ("import nexusengine.supervisor.supervisor", ["torch", "starlette"]),
        ("from nexusengine.cli.main import build_parser; build_parser([])", ["torch", "numpy", "rich", "msgspec"]),
    ],
)
def test_importing_a_part_does_not_import_what_it_does_not_need(code: str, forbidden: list[str]) -> None:
    check = f"{code}\nimport sys\nprint([m for m in {forbidden!r} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_start_up_is_told_line_by_line_and_a_terminal_sees_percentages_change(
    on_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    announcer = Announcer(ServeConfig())
    announcer(Listening("0.0.0.0", 77))
    for fraction in (0.1, 0.2, 0.3):
        announcer(Phase("loading weights (w0)", fraction))
    announcer(Ready())
    announcer(Draining(30.0))
    end_progress()
    out, err = capsys.readouterr()
    assert "serves smollm2-135m at http://127.0.0.1:77 " in out
    assert "\ncurl http://127.0.0.1:77/v1/chat/completions " in out
    lines = [line.rsplit("\r", 1)[-1].removesuffix("\x1b[K") for line in err.strip("\n").split("\n")]
    assert lines == [
        "==> listening at http://127.0.0.1:77, not ready yet",
        f"==> loading weights (w0) {30 if on_terminal else 10} %",
        "==> finishing the requests in progress, for 30 s at most; a second Ctrl-C or SIGTERM ends at once",
    ]


def test_a_line_from_another_process_does_not_land_on_the_progress_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it did: `==> allocating the KV cache (w0)[w0] 16:26:18 INFO ...`."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    announcer = Announcer(ServeConfig())
    announcer(Phase("loading weights (w0)", 0.5))
    write_line("[w0] a log line")
    announcer(Phase("loading weights (w0)", 0.6))
    record = logging.LogRecord("nexusengine.x", logging.WARNING, __file__, 1, "one of ours", None, None)
    Handler().emit(record)
    announcer(Ready())
    assert capsys.readouterr().err.split("\n") == [
        "==> loading weights (w0) 50 %",
        "[w0] a log line",
        "==> loading weights (w0) 60 %",
        "one of ours",
        "",
    ]


def test_a_wrong_setting_ends_with_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "seventy"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--port" in error
    assert "seventy" in error


def test_the_settings_page_is_the_output_of_the_config_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "configuration.md").read_text()


def test_the_printed_curl_is_a_command_whatever_the_model_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    announcer = Announcer(ServeConfig(model='./it\'s "mine".gguf'))
    announcer(Listening("127.0.0.1", 77))
    announcer(Ready())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("curl "))
    assert json.loads(shlex.split(line)[-1])["model"] == './it\'s "mine".gguf'
