"""Profiles of the user's own device: fitted to a step log, read from a file, found in a folder."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusengine.cli.main import main
from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.step_log import LoggedStep, encode
from nexusengine.profiles.fit import FEATURES, fit_steps, scatter_of
from nexusengine.profiles.registry import list_profiles, load_profile
from nexusengine.profiles.user_file import FOLDER_VARIABLE, read_profile

GOOD: dict[str, Any] = {
    "nexusengine_profile": 1,
    "device": "mygpu",
    "model": "llama-3.1-8b",
    "weights_s": [0.01] + [0.001] * (FEATURES - 1),
    "kv_capacity_tokens": 100_000,
}


def made_up_steps(count: int, scatter: float = 0.02) -> tuple[list[LoggedStep], list[float]]:
    """Steps of a device that takes 9 ms + 40 us a token + 30 ns a KV token + 2 ns a pair, and those times exactly."""
    rng = np.random.default_rng(5)
    steps, exact = [], []
    for i in range(count):
        n = int(rng.integers(1, 64))
        q, ctx = [1] * n, rng.integers(1, 4000, n).tolist()
        if rng.random() < 0.4:
            q.append(int(rng.integers(16, 1500)))
            ctx.append(int(rng.integers(0, 2000)))
        f = StepFeatures.of(np.array(q, np.int32), np.array(ctx, np.int32))
        ms = 9.0 + 0.04 * f.tokens + 3e-5 * f.decode_kv_tokens + 2e-6 * f.prefill_attention
        exact.append(ms / 1e3)
        steps.append(LoggedStep(t=float(i), q=q, ctx=ctx, ms=ms * float(rng.normal(1.0, scatter))))
    return steps, exact


def write_log(path: Path, steps: list[LoggedStep]) -> Path:
    path.write_bytes(gzip.compress(b"".join(map(encode, steps))))
    return path


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({k: v for k, v in (GOOD | changes).items() if v is not None}))
    return path


def test_a_fit_finds_the_times_behind_scattered_steps() -> None:
    steps, exact = made_up_steps(1500)
    fit = fit_steps([s.features for s in steps], [s.ms / 1e3 for s in steps])
    assert fit.median_error < 0.02
    assert fit.steps == 1500
    assert min(fit.weights_s) >= 0.0
    decode, mixed = scatter_of([s.features for s in steps], [s.ms / 1e3 for s in steps])
    assert decode.std() == pytest.approx(0.02, rel=0.2)
    assert mixed.std() == pytest.approx(0.02, rel=0.2)
    assert len(exact) == 1500


def test_steps_of_another_kind_do_not_spoil_a_fit() -> None:
    steps, _ = made_up_steps(600)
    seconds = [s.ms / 1e3 for s in steps]
    seconds[0], seconds[300] = 30.0, 12.0  # warm-up, a graph captured
    fit = fit_steps([s.features for s in steps], seconds)
    assert fit.steps == 598
    assert fit.median_error < 0.02
    assert max(fit.decode_noise + fit.mixed_noise) < 1.2


def test_a_log_without_prompts_can_be_fitted() -> None:
    steps, _ = made_up_steps(900)
    decodes = [s for s in steps if s.features.prefills == 0]
    fit = fit_steps([s.features for s in decodes], [s.ms / 1e3 for s in decodes])
    assert fit.median_error < 0.02
    assert fit.mixed_noise == fit.decode_noise


def test_too_few_steps_are_refused() -> None:
    steps, _ = made_up_steps(100)
    with pytest.raises(ConfigError, match="100 steps are too few"):
        fit_steps([s.features for s in steps], [s.ms for s in steps])


def test_the_command_makes_a_file_that_simulator_and_emulated_devices_can_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, exact = made_up_steps(1200)
    log, out = write_log(tmp_path / "log.jsonl.gz", steps), tmp_path / "mygpu.json"
    assert main(["profiles", "fit", str(log), "--name", "mygpu", "--output", str(out)]) == 0
    assert "mygpu/llama-3.1-8b, 1200 steps" in capsys.readouterr().out
    profile = load_profile(str(out))
    assert (profile.identity.name, profile.identity.confidence) == ("mygpu/llama-3.1-8b", "resampled")
    assert profile.identity.kv_capacity_tokens == max(sum(s.q) + sum(s.ctx) for s in steps)
    errors = [
        profile.step_s(np.array(s.q, np.int32), np.array(s.ctx, np.int32)) / t - 1
        for s, t in zip(steps, exact, strict=True)
    ]
    assert np.abs(errors).mean() < 0.01

    assert main(["profiles", "--file", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in shown] == ["mygpu/llama-3.1-8b"]

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert load_profile("mygpu").step_s(np.ones(3, np.int32), np.ones(3, np.int32)) > 0
    assert list_profiles()[0].identity.name == "mygpu/llama-3.1-8b"


def test_a_file_of_the_user_comes_before_the_profile_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "h100.json", device="h100")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert load_profile("h100").identity.confidence == "resampled"
    assert load_profile("h100/qwen3-32b").identity.confidence == "composed"


def test_a_file_without_scatter_takes_the_pooled_one(tmp_path: Path) -> None:
    u = np.linspace(0.0, 1.0, 11)
    own = load_profile(str(write(tmp_path / "p.json")))
    assert own.noise(u, True) == pytest.approx(load_profile("h100").noise(u, True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": None}, "device"),
        ({"device": "a/b"}, "device"),
        ({"weights_s": [0.01] * 3}, "weights_s"),
        ({"weights_s": [-0.01] * FEATURES}, "weights_s"),
        ({"weights_s": [0.0] * FEATURES}, "all weights_s are zero"),
        ({"kv_capacity_tokens": 3}, "kv_capacity_tokens"),
        ({"nexusengine_profile": 2}, "version 2"),
        ({"speed": 3}, "speed"),
        ({"noise": {"decode": [1.0, 0.9], "mixed": [1.0, 1.0]}}, "noise.decode decreases"),
        ({"noise": {"decode": [1.0, 1.0], "mixed": [0.0, 1.0]}}, "mixed"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_at_fault(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "p.json", **changes)
    with pytest.raises(ConfigError, match=said) as error:
        read_profile(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_profile(str(tmp_path / "none.json"))
    (tmp_path / "x.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="is not a profile"):
        load_profile(str(tmp_path / "x.json"))


def test_a_folder_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, "/no/such/folder")
    with pytest.raises(ConfigError, match="/no/such/folder"):
        load_profile("h100")


def test_the_command_refuses_a_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "--file", str(write(tmp_path / "p.json", kv_capacity_tokens=-1))]) == 1
    assert "kv_capacity_tokens" in capsys.readouterr().err


def test_the_table_names_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    shown = capsys.readouterr().out
    for info in list_profiles():
        assert info.identity.name in shown
