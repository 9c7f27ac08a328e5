"""`nexusengine bench serve` against servers of both kinds: one that runs, and one it starts itself."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from nexusengine.cli.main import main
from tests.api.conftest import MODEL, Running

KEYS = {
    "offered",
    "completed",
    "attainment",
    "attainment_strict",
    "attainment_by_class",
    "attainment_longest_decile",
    "attainment_token_weighted",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "output_tokens_per_s",
    "worst_wait_s",
    "errors",
    "late_ms",
    "client_cpu_share",
}


def test_every_request_of_the_load_is_answered_by_a_server_that_runs(
    server: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "run.json"
    load = [
        "--lengths",
        "input=20,output=6",
        "--arrivals",
        "poisson",
        "--rate",
        "40",
        "--duration",
        "1",
        "--classes",
        "mixed",
        "--seed",
        "3",
        "--json",
    ]
    assert main(["bench", "serve", "--url", server.url, *load, "--output", str(output)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) >= KEYS
    assert figures["model"] == MODEL
    assert figures["offered"] == figures["completed"] > 20
    assert figures["errors"] == {}
    assert figures["server"]["by_worker"] == {"w0": figures["offered"]}
    assert set(figures["attainment_by_class"]) == {"interactive", "standard", "batch"}
    requests = json.loads(output.read_text())["requests"]
    assert len(requests) == figures["offered"]
    assert all((r["prompt_tokens"], r["output_tokens"]) == (20, 6) for r in requests)
    assert server.core.stats().prompt_tokens == 20 * figures["offered"]
    assert server.idle()


def test_a_trace_is_sent_as_it_was_recorded(
    server: Running, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,7,3\n0.2,9,2\n0.3,11,1\n99,1,1\n")
    load = ["--trace", str(trace), "--arrivals", "trace", "--duration", "5", "--output", str(tmp_path / "run.json")]
    assert main(["bench", "serve", "--url", server.url, *load]) == 0
    assert "attainment" in capsys.readouterr().out
    requests = json.loads((tmp_path / "run.json").read_text())["requests"]
    assert [(r["send_at_s"], r["prompt_tokens"], r["output_tokens"]) for r in requests] == [
        (0.0, 7, 3),
        (0.2, 9, 2),
        (0.3, 11, 1),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lengths", "input=5,output=5", "--trace", "x.csv"], "either --trace"),
        ([], "either --trace"),
        (["--lengths", "5"], "input=DIST"),
        (["--lengths", "input=5,output=5", "--devices", "cpu"], "--devices is for a server of our own"),
        (["--lengths", "input=5,output=5", "--arrivals", "poisson", "--rate", "1", "--classes", "fast"], "'fast'"),
        (["--lengths", "input=5,output=5"], "--arrivals poisson"),
    ],
)
def test_what_does_not_go_together_is_named(
    server: Running, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["bench", "serve", "--url", server.url, *options]) == 1
    assert words in capsys.readouterr().err


def test_without_a_url_it_starts_a_server_with_the_classes_of_the_file_and_ends_it(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    classes = tmp_path / "slo.toml"
    classes.write_text("[gold]\nttft_s = 20\ntpot_s = 5\nshare = 1\n")
    before = psutil.Process().children(recursive=True)  # what other tests keep, to render chat templates
    load = f"--lengths input=30,output=5 --arrivals gamma:2 --rate 10 --duration 2 --classes {classes} --json".split()
    assert main(["bench", "serve", "--devices", "emulated:instant", "--no-prefix-caching", *load]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["offered"] == figures["completed"] > 5
    assert figures["attainment_by_class"] == {"gold": 1.0}
    assert not set(psutil.Process().children(recursive=True)) - set(before)
