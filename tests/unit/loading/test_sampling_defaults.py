"""How a model's makers sample from it: what its files say, and what counts in a request."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nexusengine.errors import ModelLoadError
from nexusengine.loading.embedded import FILE_NAME
from nexusengine.loading.sampling_defaults import SamplingDefaults, of_folder, of_gguf
from nexusengine.types import SamplingParams


def saved(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (  # Llama 3.1's
            {"bos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": "4"},
            SamplingDefaults(temperature=0.6, top_p=0.9),
        ),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "min_p": 0}, SamplingDefaults(0.7, None, 20, 0)),
        ({"temperature": 0.5}, SamplingDefaults(temperature=0.5)),
        ({"do_sample": False, "temperature": 0.5, "top_k": 50}, SamplingDefaults(temperature=0.0)),
        ({"_from_model_config": True, "eos_token_id": 2}, SamplingDefaults()),
        ({"temperature": None, "top_k": -1}, SamplingDefaults(top_k=0)),
        ({"temperature": 1, "top_p": 1}, SamplingDefaults(temperature=1, top_p=1)),
    ],
)
def test_generation_config_is_read(tmp_path: Path, values: dict[str, Any], expected: SamplingDefaults) -> None:
    assert of_folder(saved(tmp_path, **values)) == expected


def test_a_model_that_says_nothing_has_no_defaults(tmp_path: Path) -> None:
    assert of_folder(tmp_path) == of_gguf({}, Path("m.gguf")) == SamplingDefaults()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
        ({"temperature": -1}, "temperature must be between"),
        ({"top_p": 2}, "top_p must be between"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"repetition_penalty": 1.05}, "repetition_penalty is 1.05, which is not supported and ignored"),
        ({"num_beams": 4}, "num_beams is 4"),
    ],
)
def test_what_cannot_count_is_ignored_with_a_warning(
    tmp_path: Path, values: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nexusengine"):
        found = of_folder(saved(tmp_path, **{"min_p": 0.1, **values}))
    assert found == SamplingDefaults(min_p=0.1)
    assert words in caplog.text
    assert "generation_config.json" in caplog.text


def test_a_penalty_that_changes_nothing_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_folder(saved(tmp_path, repetition_penalty=1.0, num_beams=1))
    assert caplog.text == ""


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json is not valid JSON"):
        of_folder(tmp_path)


def test_gguf_keys_are_read_and_come_before_the_table() -> None:
    keys = {"general.sampling.temp": 0.7, "general.sampling.top_p": 0.8, "general.sampling.top_k": 20}
    expected = SamplingDefaults(0.7, 0.8, 20)
    assert of_gguf(keys, Path("m.gguf")) == expected
    assert of_gguf(keys, Path("models") / FILE_NAME) == expected
    assert of_gguf({}, Path("models") / FILE_NAME) == SamplingDefaults(temperature=0.0)


def test_defaults_fill_only_what_is_not_named() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20)
    given = SamplingParams(max_tokens=5, seed=1)
    assert defaults.fill(given, {"max_tokens", "seed"}) == SamplingParams(0.6, 20, max_tokens=5, seed=1)
    assert defaults.fill(SamplingParams(temperature=1.0), {"temperature"}) == SamplingParams(1.0, 20)
    greedy = SamplingParams(temperature=0.0)
    assert defaults.fill(greedy, {"temperature"}) == greedy
    assert SamplingDefaults().fill(given, ()) == given
