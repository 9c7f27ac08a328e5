"""`nexusengine perf replay`: the figures, their table, and files that are not what they should be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusengine.cli.main import main
from nexusengine.cli.perf import load_steps
from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import make_model
from nexusengine.perf.replay import MeasuredStep, Replay, figures, replay
from nexusengine.perf.step_log import LoggedStep, encode, read_steps

LOG = Path(__file__).parents[2] / "data" / "steps.jsonl.gz"
SHARED = Path(__file__).parents[4] / "shared" / "step_logs"
KEYS = {"mape", "mape_after_500", "mape_first_100", "mape_mixed", "p99", "coverage_95", "us_per_step"}


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert main(["perf", "replay", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_predictions() -> None:
    measured = np.ones(600)
    mean = np.concatenate([np.full(100, 1.5), np.full(400, 0.9), np.full(100, 1.02)])
    mixed = np.arange(600) % 2 == 0
    tokens = np.where(np.arange(600) < 590, 100.0, 900.0)
    f = figures(Replay(measured, mean, mean + 0.05, tokens, mixed, tokens < 500, cost_s=0.006))
    assert f["mape_first_100"] == pytest.approx(50.0)
    assert f["mape_after_500"] == pytest.approx(2.0)
    assert f["mape"] == pytest.approx((100 * 50 + 400 * 10 + 100 * 2) / 600)
    assert f["mape_mixed"] == f["mape_decode"] == f["mape"]
    assert f["bias"] == pytest.approx((100 * 50 - 400 * 10 + 100 * 2) / 600)
    assert f["coverage_95"] == pytest.approx(100 * 200 / 600)
    assert f["p99"] == pytest.approx(50.0)
    assert f["steps_unseen"] == 10
    assert f["bias_unseen"] == pytest.approx(2.0)
    assert f["us_per_step"] == pytest.approx(10.0)


def test_a_figure_of_no_steps_is_none() -> None:
    steps = [MeasuredStep(StepFeatures(4, 4, 0, 0.0, 100), 0.02)] * 3
    f = figures(replay(make_model(), steps, lambda: 0.0))
    assert f["mape_after_500"] is None
    assert f["mape_mixed"] is None
    assert f["mape"] is not None


def test_every_step_is_predicted_before_it_is_learned_and_the_first_teaches_nothing() -> None:
    told: list[tuple[str, int]] = []

    class Spy:
        def predict(self, features: StepFeatures) -> Any:
            told.append(("predict", features.tokens))
            return make_model().predict(features)

        def observe(self, features: StepFeatures, seconds: float) -> None:
            told.append(("observe", features.tokens))

    steps = [MeasuredStep(StepFeatures(n, 1, 1), 0.1, warm_up=n == 10) for n in (10, 20, 30)]
    replay(Spy(), steps, lambda: 0.0, train_max_tokens=20)  # type: ignore[arg-type]
    assert told == [("predict", 10), ("predict", 20), ("observe", 20), ("predict", 30)]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_replay_prints_all_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed(capsys, str(LOG))
    assert set(result) >= KEYS
    assert result["unit"] == "percent"
    assert result["steps"] == 800
    assert result["mape_after_500"] < 2.5  # the scatter alone makes 1.6
    assert result["mape_first_100"] < 6.0
    assert 93.0 <= result["coverage_95"] <= 97.0


def test_all_models_are_compared_and_the_online_one_is_best(capsys: pytest.CaptureFixture[str]) -> None:
    results = printed(capsys, str(LOG), "--all-models")
    errors = {r["model"]: r["mape_after_500"] for r in results}
    assert set(errors) == {"online", "paper-surface", "line", "line2"}
    assert min(errors, key=errors.__getitem__) == "online"


def test_larger_steps_than_were_learned_from_are_reported_apart(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed(capsys, str(LOG), "--train-max-tokens", "300")
    assert result["steps_unseen"] > 200
    assert abs(result["bias_unseen"]) < 8.0


def test_a_replay_can_begin_with_a_datasheet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = printed(capsys, str(LOG), "--device", "a6000")
    assert result["mape_first_100"] < 10.0
    assert main(["perf", "replay", str(LOG), "--model-config", "x.json"]) == 1
    assert "--device" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_log_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perf", "replay", str(LOG), str(LOG), "--model", "line"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("line") == 2
    assert all(key in shown for key in KEYS)


# ---- files -----------------------------------------------------------------------------------------------------------

GOOD = encode(LoggedStep(t=1.0, q=[1, 2], ctx=[5, 0], ms=3.0, waiting=1, running=2, sched_ms=0.1))


def write(path: Path, content: bytes, *, packed: bool = True) -> str:
    path.write_bytes(gzip.compress(content) if packed else content)
    return str(path)


def test_a_log_is_read_back_as_it_was_written_and_empty_steps_are_left_out(tmp_path: Path) -> None:
    empty = b'{"t":2.0,"q":[],"ctx":[],"waiting":0,"running":0,"ms":0.5,"sched_ms":0.01}\n'
    for packed in (True, False):
        path = write(tmp_path / "log", GOOD + b"\n" + empty + GOOD.rstrip(), packed=packed)
        first, second = read_steps(path)
        assert first == second == LoggedStep(t=1.0, q=[1, 2], ctx=[5, 0], ms=3.0, waiting=1, running=2, sched_ms=0.1)
        assert first.features == StepFeatures(3, 2, 1, 2.0, 6)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"not json\n", "line 2: not a step"),
        (b"[1]\n", "line 2: not a step: Expected `object`"),
        (b'{"t":1,"q":[1],"ctx":[0]}\n', "line 2: not a step: Object missing required field `ms`"),
        (b'{"t":1,"q":[1],"ctx":[0,1],"ms":1}\n', "line 2: q has 1 entries and ctx 2"),
        (b'{"t":1,"q":[0],"ctx":[0],"ms":1}\n', "line 2: not a step: Expected `int` >= 1 - at `$.q[0]`"),
        (b'{"t":1,"q":[1],"ctx":[-1],"ms":1}\n', "line 2: not a step: Expected `int` >= 0"),
        (b'{"t":1,"q":[1],"ctx":[0],"ms":0}\n', "line 2: not a step: Expected `float` > 0.0"),
        (b'{"t":1,"q":[1],"ctx":[0],"ms":"fast"}\n', "line 2: not a step: Expected `float`, got `str`"),
        (b'{"t":1,"q":[1],"ctx":[0],"ms":NaN}\n', "line 2: not a step"),
        (b"\xff\xfe\n", "line 2: not a step"),
        (b'{"t":1,"q":[1],"ctx', "line 2: the file is cut off here"),
    ],
)
def test_a_line_that_is_no_step_is_named(
    line: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "log.jsonl.gz", GOOD + line)
    assert main(["perf", "replay", path]) == 1
    error = capsys.readouterr().err
    assert f"{path}, {said}" in error
    assert error.count("\n") == 1


def test_a_file_that_is_cut_off_or_damaged_is_named_with_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = LOG.read_bytes()
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"after line \d{3}: the file is cut off"):
        load_steps(str(path))
    path.write_bytes(whole[:200] + bytes(400) + whole[600:])
    with pytest.raises(ConfigError, match=r"(after line \d+: damaged|line \d+: not a step)"):
        load_steps(str(path))
    assert main(["perf", "replay", str(tmp_path / "none.gz")]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no step"):
        load_steps(write(path, b""))


# ---- measured steps --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="measured step logs are not here (../shared/step_logs)")
@pytest.mark.parametrize("log", sorted(p.name for p in SHARED.glob("*.jsonl.gz")))
def test_measured_steps_are_predicted_as_well_as_is_promised(log: str) -> None:
    steps = load_steps(str(SHARED / log))
    f = figures(replay(make_model(), steps, lambda: 0.0))
    assert (f["mape_after_500"] or 0.0) <= (1.5 if log.startswith("a6000") else 2.2)
    assert (f["mape_first_100"] or 0.0) <= 6.0
    assert (f["mape_mixed"] or 0.0) <= 5.0
    assert 93.0 <= (f["coverage_95"] or 0.0) <= 97.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="measured step logs are not here (../shared/step_logs)")
@pytest.mark.parametrize("budget", [256, 512, 1024])
def test_steps_of_2048_tokens_are_foreseen_from_logs_of_smaller_ones(budget: int) -> None:
    model = make_model()
    replay(model, load_steps(str(SHARED / f"a6000_llama31_8b_budget{budget}.jsonl.gz")), lambda: 0.0)
    large = [
        s
        for s in load_steps(str(SHARED / "a6000_llama31_8b_budget2048.jsonl.gz"))[1:]
        if s.features.tokens > 1.5 * budget and s.features.prefills
    ]
    errors = [model.predict(s.features).mean_s / s.seconds - 1.0 for s in large]
    assert len(errors) > 500
    assert abs(sum(errors) / len(errors)) < 0.08
