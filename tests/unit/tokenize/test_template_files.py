"""Where chat templates are read from, and which of several is used, as in transformers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from nexusengine.errors import ModelLoadError
from nexusengine.loading.resolve import ModelFiles
from nexusengine.model_config import ModelConfig
from nexusengine.tokenize import load_tokenizer, template_files

NAMED = [{"name": name, "template": name + " {{ messages[0].content }}"} for name in ("default", "tool_use", "rag")]
USER = [{"role": "user", "content": "« Grüße »"}]


def model(folder: Path, config_template: Any = None, **texts: str) -> ModelFiles:
    """A model's folder; texts: further files by a name in which "/" is "__"."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "a": 1}, []))
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": config_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    config = ModelConfig("LlamaForCausalLM", 10, 8, 8, 1, 1, 1, 8, 64, 1e-5, 1e4)
    return ModelFiles("m", folder, "none", config, ())


@pytest.mark.parametrize(
    ("config_template", "texts"),
    [
        ("config {{ messages[0].content }}", {}),
        (NAMED, {}),
        ("config", {"chat_template.jinja": "« file » {{ messages[0].content }}"}),
        (NAMED, {"chat_template.jinja": "file"}),
        (None, {"chat_template.jinja": "file", "additional_chat_templates__tool_use.jinja": "extra"}),
        (None, {"chat_template.jinja": "file", "additional_chat_templates__odd.jinja": "{{ odd }}"}),
    ],
)
def test_templates_are_found_and_chosen_as_in_transformers(
    tmp_path: Path, config_template: Any, texts: dict[str, str]
) -> None:
    ours = load_tokenizer(model(tmp_path, config_template, **texts))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for tools in (None, [], [{"type": "function", "function": {"name": "f"}}]):
        expected = theirs.apply_chat_template(USER, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(USER, tools=tools) == expected


def test_chat_template_json_comes_before_the_config(tmp_path: Path) -> None:
    found = model(tmp_path, "config", **{"chat_template.json": json.dumps({"chat_template": "json"})})
    assert load_tokenizer(found).render_chat(USER) == "json"


def test_additional_templates_do_not_hide_the_default_of_the_config(tmp_path: Path) -> None:
    found = model(tmp_path, "config", **{"additional_chat_templates__rag.jinja": "rag"})
    assert load_tokenizer(found).render_chat(USER) == "config"


def test_templates_without_a_default_are_not_used_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nexusengine"):
        assert load_tokenizer(model(tmp_path, NAMED[1:])).chat_template is None
    assert "tool_use, rag, but no default" in caplog.text


def test_templates_are_read_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    model(tmp_path, None, **{"chat_template.jinja": "« {{ messages[0].content }} »"})
    code = (
        "from pathlib import Path; import sys; from nexusengine.tokenize import template_files\n"
        "print(ascii(template_files.of_folder(Path(sys.argv[1]), {})['default']))"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ascii("« {{ messages[0].content }} »")


@pytest.mark.parametrize("value", [5, {"default": "x"}, [5], [{"template": "x"}], [{"name": "default"}], [{"name": 1}]])
def test_a_template_that_is_none_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ModelLoadError, match="chat_template"):
        load_tokenizer(model(tmp_path, value))
    with pytest.raises(ModelLoadError, match=r"m\.gguf: tokenizer\.chat_template"):
        template_files.of_gguf({"tokenizer.chat_template": value}, Path("m.gguf"))


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja is not valid UTF-8 at byte 2"):
        template_files.of_folder(tmp_path, {})


def test_gguf_files_may_hold_several() -> None:
    metadata = {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["x"],
    }
    assert template_files.of_gguf(metadata, Path("m.gguf")) == {"default": "a", "tool_use": "b"}
    assert template_files.of_gguf({}, Path("m.gguf")) == {}
