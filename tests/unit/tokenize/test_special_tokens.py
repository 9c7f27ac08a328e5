"""Special tokens: where their names come from, which of them end generation, and stop strings that are one of them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

import nexusengine.engine.offline
from nexusengine import Engine, SamplingParams
from nexusengine.clock import MonotonicClock
from nexusengine.errors import ModelLoadError
from nexusengine.loading.config_json import read_config
from nexusengine.tokenize import Tokenizer
from nexusengine.tokenize.load import json_tokenizer, special_token_texts
from tests.support.fakes import VOCABULARY, FakeExecutor, continuation, make_core

TOKENS = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "<pad>", "<|im_end|>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"
USER = [{"role": "user", "content": "x"}]


def save(folder: Path, *, post_processor: bool = False, added: bool = True, **files: Any) -> None:
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), strip])
    if added:
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("settings", "mapped", "rendered"),
    [
        (NAMES, {}, "<s>|</s>|<unk>|<pad>"),
        ({}, NAMES, "<s>|</s>|<unk>|<pad>"),
        ({"bos_token": None}, {}, "|||"),
        ({"bos_token": None, "eos_token": {"content": "</s>", "lstrip": True}}, {}, "|</s>||"),
        ({"eos_token": "</s>"}, {"bos_token": {"content": "<s>"}}, "<s>|</s>||"),
        (
            {"bos_token": "<s>"},
            {"bos_token": "<pad>"},
            "<pad>|||",
        ),  # beside settings of the old form the map goes first
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<pad>"}, "<s>|||"),
        ({"bos_token": None, "added_tokens_decoder": {}}, {"bos_token": "<pad>"}, "|||"),
    ],
)
def test_special_tokens_of_a_template(
    tmp_path: Path, settings: dict[str, Any], mapped: dict[str, Any], rendered: str
) -> None:
    save(tmp_path, tokenizer_config={**settings, "chat_template": TEMPLATE}, special_tokens_map=mapped)
    assert json_tokenizer(tmp_path, None, ()).render_chat(USER) == rendered


def test_a_null_token_has_no_text() -> None:
    assert special_token_texts({"bos_token": None, "eos_token": "</s>", "x_token": "y"}, "m") == {"eos_token": "</s>"}
    with pytest.raises(ModelLoadError, match="m: pad_token is 7"):
        special_token_texts({"pad_token": 7}, "m")


FLAGS: list[dict[str, Any]] = [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}]


@pytest.mark.parametrize(
    ("post_processor", "added", "flags", "where"),
    list(itertools.product([True, False], [True, False], FLAGS, ["tokenizer_config", "special_tokens_map"])),
)
def test_ids_of_a_prompt_are_those_of_transformers(
    tmp_path: Path, post_processor: bool, added: bool, flags: dict[str, Any], where: str
) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **flags}
    files = {"tokenizer_config": settings, "config": {"model_type": "llama"}}
    files[where] = {**files.get(where, {}), **NAMES}
    save(tmp_path, post_processor=post_processor, added=added, **files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), json_tokenizer(tmp_path, None, ())
    for text in ("a b", "a</s>b", " a<pad>", "<s>a"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<pad>", "<|im_end|>"]},
        {"extra_special_tokens": {"image_token": "<pad>"}},
        {"added_tokens_decoder": {"7": {"content": "<pad>", "special": True, "normalized": False, "rstrip": True}}},
        {"added_tokens_decoder": {"7": {"content": "<pad>", "special": False, "normalized": False}}},
        {"added_tokens_decoder": {"7": {"content": "<pad>", "special": False}}, "pad_token": "<pad>"},
    ],
)
def test_other_special_tokens_are_those_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    save(tmp_path, tokenizer_config=settings, config={"model_type": "llama"})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), json_tokenizer(tmp_path, None, ())
    for text in ("a<pad>  a b", "<|im_end|>a", "<pad><pad>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            whole = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == whole


CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1},
    **{"num_hidden_layers": 1, "vocab_size": 10, "max_position_embeddings": 64},
}


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config": {"eos_token_id": 3}, "tokenizer_config": {"eos_token": "</s>"}}, {2, 3}),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 5]}}, {3, 4, 5}),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, {2}),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}}, "config": {"eos_token_id": [4]}}, {2, 4}),
        ({"tokenizer_config": {"eos_token": "unheard of"}, "config": {"eos_token_id": 3}}, {3}),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 3}}, {3}),
    ],
)
def test_ends_of_generation_are_those_of_all_files(tmp_path: Path, files: dict[str, Any], ends: set[int]) -> None:
    save(tmp_path, **{**files, "config": CONFIG | files.get("config", {})})
    tokenizer = json_tokenizer(tmp_path, None, read_config(tmp_path).eos_token_ids)
    assert set(tokenizer.eos_token_ids) == ends
    assert len(tokenizer.eos_token_ids) == len(ends)


def test_a_named_token_that_is_not_marked_as_added_is_found_in_a_text_and_left_out_of_it(tmp_path: Path) -> None:
    save(tmp_path, tokenizer_config={"eos_token": {"content": "<|im_end|>", "rstrip": True}})
    tokenizer = json_tokenizer(tmp_path, None, ())
    assert tokenizer.encode("a<|im_end|>  a") == [6, 8, 6]
    assert tokenizer.decode([6, 8]) == "a"
    assert tokenizer.special_token_id("<|im_end|>") == 8
    assert tokenizer.special_token_id("a") is None


# ---- stop strings ---------------------------------------------------------------------------------------------------

PROMPT = [5, 6, 7]
GENERATED = continuation(PROMPT, 6)


def engine_with(monkeypatch: pytest.MonkeyPatch, eos: tuple[int, ...]) -> Engine:
    """The fake device with a tokenizer whose fourth generated token is the special token <|eot_id|>."""
    vocabulary = {f"t{i}": i for i in range(VOCABULARY) if i != GENERATED[3]} | {"<|eot_id|>": GENERATED[3]}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(["<|eot_id|>"])
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(backend, bos_token_id=None, eos_token_ids=eos)
    core = make_core(FakeExecutor(num_blocks=256), clock=MonotonicClock())
    monkeypatch.setattr(nexusengine.engine.offline, "make_local", lambda config: (core, tokenizer, VOCABULARY))
    return Engine("fake", devices="cpu")


@pytest.mark.parametrize("eos", [(), (GENERATED[3],)])
def test_a_stop_string_that_is_a_special_token_stops_by_its_id(
    monkeypatch: pytest.MonkeyPatch, eos: tuple[int, ...]
) -> None:
    assert GENERATED.index(GENERATED[3]) == 3
    with engine_with(monkeypatch, eos) as engine:
        sampling = SamplingParams(temperature=0.0, max_tokens=6, stop=("never", "<|eot_id|>"))
        (output,) = engine.generate([PROMPT], sampling)
        assert list(output.token_ids) == GENERATED[:3]
        assert output.text == "".join(f"t{i}" for i in GENERATED[:3])
        assert (output.finish_reason, output.stop_reason) == ("stop", "<|eot_id|>")
        assert output.timings is not None
        assert output.timings.output_tokens == 4, "the token that ended it counts"
        if eos:
            (ended,) = engine.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=6))
            assert (ended.finish_reason, ended.stop_reason) == ("stop", None)


def test_a_stop_token_given_by_id_is_told_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_with(monkeypatch, ()) as engine:
        sampling = SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=(GENERATED[3],))
        (output,) = engine.generate([PROMPT], sampling)
        assert (output.finish_reason, output.stop_reason) == ("stop", GENERATED[3])


# ---- locales --------------------------------------------------------------------------------------------------------

LOCALES = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C.UTF-8"},
]
READ = """
import sys
from pathlib import Path
from nexusengine.tokenize.load import json_tokenizer
tokenizer = json_tokenizer(Path(sys.argv[1]), None, ())
text = tokenizer.render_chat([{"role": "user", "content": "x"}])
sys.stdout.buffer.write(f"{text} {tokenizer.eos_token_ids}".encode())
"""


@pytest.mark.parametrize("environ", LOCALES)
@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_files_are_utf_8_whatever_the_locale(tmp_path: Path, environ: dict[str, str], where: str) -> None:
    template = "\u00ab{{ messages[0].content }}{{ eos_token }}\u00bb \U0001f999"
    settings = {"eos_token": "\u2581a"}
    save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    data = (
        template if where.endswith(".jinja") else json.dumps(settings | {"chat_template": template}, ensure_ascii=False)
    )
    (tmp_path / where).write_text(data, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], env={**os.environ, **environ}, capture_output=True, check=True
    )
    assert done.stdout.decode() == "\u00abx\u2581a\u00bb \U0001f999 (6,)"
