"""Tokenizers and chat templates: what a model's files may hold, and what they may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nexusengine.errors import InvalidRequest, ModelLoadError
from nexusengine.loading.resolve import ModelFiles
from nexusengine.model_config import ModelConfig
from nexusengine.tokenize import load_tokenizer
from nexusengine.tokenize.chat_template import ChatTemplate
from nexusengine.tokenize.gguf_tokenizer import build


def files(folder: Path, eos: tuple[int, ...] = ()) -> ModelFiles:
    config = ModelConfig("LlamaForCausalLM", 10, 8, 8, 1, 1, 1, 8, 64, 1e-5, 1e4, eos_token_ids=eos)
    return ModelFiles("m", folder, "none", config, ())


def save_tokenizer(folder: Path, **settings: Any) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_tokenizer_is_read_from_json_with_its_template_and_end_of_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, eos_token={"content": "</s>"}, chat_template="{{ eos_token }}{{ messages[0].content }}")
    tokenizer = load_tokenizer(files(tmp_path))
    assert tokenizer.encode("ab") == [4]
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "</s>x"
    (tmp_path / "chat_template.jinja").write_text("other")
    assert load_tokenizer(files(tmp_path)).render_chat([{"role": "user", "content": "x"}]) == "other"


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing"):
        load_tokenizer(files(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is missing, and tokenizer\.model is not supported"):
        load_tokenizer(files(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is not a usable tokenizer"):
        load_tokenizer(files(tmp_path))


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(files(tmp_path)).encode_chat([{"role": "user", "content": "x"}])


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(InvalidRequest, match="Unicode"):
        load_tokenizer(files(tmp_path)).encode("\ud800")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": "t5"}, "'t5' is not supported"),
        ({"model": "rwkv"}, "'rwkv' is not supported"),
        ({"model": "plamo2"}, "'plamo2' is not supported"),
        ({"model": 5}, "model is 5, which is not of the right type"),
        ({"model": None}, "model is missing"),
        ({"pre": 7}, "pre is 7"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": ["a", "b", 3]}, "tokens holds 3"),
        ({"tokens": ["a", "b", "a"]}, "'a' is there twice, as 0 and 2"),
        ({"merges": None}, "merges is missing"),
        ({"merges": [" "]}, "malformed"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ({"scores": [1.0]}, "malformed"),
        ({"pre": "unheard-of"}, "unheard-of"),
        ({"tokens": None}, "tokens is missing"),
        ({"merges": ["a"]}, "malformed"),
        ({"merges": ["a z"]}, "do not agree"),
        ({"token_type": [1]}, "malformed"),
    ],
)
def test_a_gguf_vocabulary_we_cannot_use_is_named(metadata: dict[str, Any], words: str) -> None:
    sound = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    made = {f"tokenizer.ggml.{k}": v for k, v in (sound | metadata).items()}
    with pytest.raises(ModelLoadError, match=words):
        build(made, Path("m.gguf"))


def test_a_template_may_refuse_messages_and_the_reason_is_passed_on() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, "m")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidRequest, match="an object with role and content, got 'x'"):
        template.render("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}, "m").render([{"role": "user", "content": "x"}])


def test_a_template_that_is_not_jinja_fails_at_load() -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate("{% if %}", {}, "m")


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "m")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "ab"
    with pytest.raises(InvalidRequest, match="text parts"):
        template.render([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])
