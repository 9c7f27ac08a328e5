"""Tokenizers from GGUF metadata against llama.cpp: its own cases, what it says of random texts, its defaults."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.tokenize import Tokenizer
from nexusengine.tokenize.gguf_pre import BY_NAME
from nexusengine.tokenize.gguf_spm import _leftmost_first, merges_of, never_crosses_words
from nexusengine.tokenize.gguf_tokenizer import build
from nexusengine.tokenize.gguf_vocab import CONTROL, USER_DEFINED, read_vocabulary
from nexusengine.tokenize.load import gguf_tokenizer

CASES = Path(__file__).parents[4] / "shared" / "cases" / "tokenizers"
VOCABULARIES = ["deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "refact"]
# Texts and the ids llama.cpp gives for them, made with scripts/compare_tokenizers.py --store.
STORED: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "llama_cpp_ids.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`metadata(name)`: the metadata of one of llama.cpp's vocabularies, read by the product's reader."""
    known: dict[str, dict[str, Any]] = {}

    def read(name: str) -> dict[str, Any]:
        packed = CASES / f"{name}.gguf.gz"
        if not packed.is_file():
            pytest.skip(f"{packed} is not there: it comes beside the checkout, not with it")
        if name not in known:
            path = tmp_path_factory.mktemp("vocabularies") / f"{name}.gguf"
            path.write_bytes(gzip.decompress(packed.read_bytes()))
            known[name] = GGUFFile(path).metadata
        return known[name]

    return read


@pytest.mark.parametrize("name", VOCABULARIES)
def test_llama_cpps_own_cases(metadata: Any, name: str) -> None:
    tokenizer = gguf_tokenizer(metadata(name), name)
    texts = (CASES / f"{name}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (CASES / f"{name}.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=False):
        ids = [int(i) for i in line.split()]
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_random_texts_have_llama_cpps_ids(metadata: Any, name: str) -> None:
    tokenizer = gguf_tokenizer(metadata(name), name)
    assert len(STORED["ids"][name]) == len(STORED["texts"])
    for text, ids in zip(STORED["texts"], STORED["ids"][name], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


@pytest.mark.parametrize("pre", [name for name in BY_NAME if not BY_NAME[name].raw])
def test_every_pre_tokenizer_splits_as_llama_cpp_does(metadata: Any, pre: str) -> None:
    backend = build({**metadata("gpt-2"), "tokenizer.ggml.pre": pre}, "gpt-2")
    ids = [backend.encode(text, add_special_tokens=False).ids for text in STORED["texts"]]
    assert digest(ids) == STORED["pre"][pre]


def digest(ids: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def test_bytes_of_a_character_come_out_as_the_character(metadata: Any) -> None:
    tokenizer = gguf_tokenizer(metadata("llama-spm"), "llama-spm")
    assert tokenizer.decode([29871, 243, 162, 169, 156]) == "\U0001f999"
    assert tokenizer.encode("\U0001f999") == [1, 29871, 243, 162, 169, 156]
    assert tokenizer.decode([243, 162, 169, 156, 15043]) == "\U0001f999 Hello"


def made(tokens: list[str], merges: list[str] | None = None, **keys: Any) -> dict[str, Any]:
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges or []} | keys
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def load(tokens: list[str], merges: list[str] | None = None, **keys: Any) -> Tokenizer:
    return gguf_tokenizer(made(tokens, merges, **keys), "m.gguf")


@pytest.mark.parametrize(
    ("keys", "ids"),
    [
        ({"pre": "gpt-2", "bos_token_id": 0}, [2]),
        ({"pre": "llama-bpe", "bos_token_id": 0}, [0, 2]),
        ({"pre": "falcon3", "bos_token_id": 0}, [0, 2]),
        ({"pre": "tekken", "bos_token_id": 0}, [0, 2]),
        ({"pre": "chameleon", "bos_token_id": 0}, [0, 2]),
        ({"pre": "qwen2", "bos_token_id": 0}, [2]),
        ({"pre": "llama-bpe"}, [2]),
        ({"pre": "llama-bpe", "bos_token_id": 99}, [2]),
        ({"pre": "llama-bpe", "bos_token_id": 0, "add_bos_token": False}, [2]),
        ({"pre": "gpt-2", "bos_token_id": 0, "add_bos_token": True}, [0, 2]),
        ({"pre": "gpt-2", "eos_token_id": 1, "add_eos_token": True}, [2, 1]),
        ({"pre": "llama-bpe", "bos_token_id": 0, "eos_token_id": 1, "add_eos_token": True}, [0, 2, 1]),
        ({"model": "gemma4", "bos_token_id": 0, "add_bos_token": False}, [0, 2]),
    ],
)
def test_bos_and_eos_go_with_a_prompt_as_llama_cpp_does_by_default(keys: dict[str, Any], ids: list[int]) -> None:
    tokenizer = load(["<s>", "<e>", "a"], token_type=[3, 3, 1], **keys)
    assert tokenizer.encode("a") == ids
    assert tokenizer.encode("a", add_special_tokens=False) == [2]


def test_a_prompt_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = load(["<s>", "<e>", "a"], token_type=[3, 3, 1], pre="llama-bpe", bos_token_id=0)
    assert tokenizer.encode("<s>a") == [0, 2]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a b", [0, 3]),  # the space goes with the word, as U+2581
        ("a  b", [0, 2, 3]),
        ("\n\na", [5, 0]),  # a run of newlines that is a token
        ("\n\n\na", [4, 4, 4, 0]),  # and one that is not
        ("\u00e9", [6, 7]),  # bytes
    ],
)
def test_bpe_over_text_as_gemma_4_has_it(text: str, ids: list[int]) -> None:
    tokens = ["a", "b", "\u2581", "\u2581b", "\n", "\n\n", "<0xC3>", "<0xA9>"]
    tokenizer = load(tokens, ["\u2581 b"], model="gemma4", token_type=[1] * 6 + [6] * 2, add_bos_token=False)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_merges_of_tokens_that_are_stored_with_real_spaces_are_left_out() -> None:
    tokens = ["a", "\u2581", "  ", "<0x0A>"]
    keys = {"model": "gemma4", "token_type": [1, 1, 4, 6], "add_bos_token": False}
    tokenizer = load(tokens, ["\u2581 \u2581"], **keys)
    assert tokenizer.encode("a   a\n") == [0, 2, 1, 0, 3]
    assert tokenizer.decode([0, 2, 1, 0, 3]) == "a   a\n"


SPM: dict[str, Any] = {"model": "llama", "merges": None, "pre": "default"}


def test_sentencepiece_has_bos_eos_and_unk_by_default() -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]
    tokenizer = load(tokens, token_type=[2, 3, 3, 1, 1, 1], scores=[0.0, 0.0, 0.0, -2.0, -3.0, -1.0], **SPM)
    assert tokenizer.encode("a") == [1, 5]
    assert tokenizer.encode("a</s>a b") == [1, 5, 2, 5, 3, 0]
    assert tokenizer.eos_token_ids == (2,)
    assert load(tokens, token_type=[2, 3, 3, 1, 1, 1], add_space_prefix=False, **SPM).encode("a") == [1, 4]


@pytest.mark.parametrize(
    ("token", "cuts", "order"),
    [
        ("aaa", [1, 2], [2, 1]),  # "aa a" before "a aa": of a a a a a the left ones are together first
        ("aba", [1, 2], [2, 1]),
        ("ababa", [1, 2, 3, 4], [4, 2, 3, 1]),  # ab aba ba: "ab aba" is the leftmost of the two ways to "ababa"
        ("abc", [1, 2], [2, 1]),
    ],
)
def test_of_two_ways_to_make_a_token_the_leftmost_goes_first(token: str, cuts: list[int], order: list[int]) -> None:
    assert _leftmost_first(token, cuts) == order


def test_words_are_merged_one_by_one_unless_a_token_crosses_them(metadata: Any) -> None:
    assert never_crosses_words(merges_of(read_vocabulary(metadata("llama-spm"), "m")))
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "a\u2581", "a\u2581a"]
    scores = [0.0, 0.0, 0.0, -5.0, -6.0, -2.0, -1.0]
    assert not never_crosses_words(merges_of(read_vocabulary(made(tokens, scores=scores, **SPM), "m")))
    tokenizer = load(tokens, token_type=[2, 3, 3, 1, 1, 1, 1], scores=scores, **SPM)
    assert tokenizer.encode("a a", add_special_tokens=False) == [3, 6]


@pytest.mark.parametrize("keys", [{"pre": "default"}, {"pre": None}, {"pre": ""}])
def test_no_pre_tokenizer_is_llama_cpps_default_and_a_warning(
    keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = ["1", "2", "3", "4", "12", "123", "1234", ".", ".1"]
    merges = ["1 2", "12 3", "123 4", ". 1"]
    with caplog.at_level(logging.WARNING):
        tokenizer = load(tokens, merges, **keys)
    assert "tokenizer.ggml.pre" in caplog.text
    assert "is missing" in caplog.text or "'default'" in caplog.text
    assert tokenizer.encode("1234.1") == [5, 3, 7, 0]  # three digits, one digit, punctuation by itself


@pytest.mark.parametrize(
    ("tokens", "keys", "ends"),
    [
        (["a", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], {"eos_token_id": 1}, (1, 2, 3)),
        (["a", "<|im_end|>", "<|endoftext|>"], {}, (1, 2)),
        (["a", "x", "y", "z"], {"eos_token_id": 1, "eot_token_id": 2, "eom_token_id": 3}, (1, 2, 3)),
        (["a", "<end_of_turn>", "<eos>", "</s>"], {}, (1, 2, 3)),
        (["a", "<|end|>", "<|return|>"], {}, (1, 2)),
        (["a", "<|end|>", "<|return|>", "<|call|>"], {}, (2, 3)),  # gpt-oss: <|end|> ends a part of a turn
        (["a", "<|end|>", "<|flush|>", "<|calls|>"], {}, (2, 3)),
        (["a", "<|tool_response>", "</s>"], {}, (1,)),  # gemma4: </s> is a normal token
        (["a", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"], {}, (1, 2, 3)),
        (["a", "b"], {"eos_token_id": 7, "eot_token_id": -1}, ()),
    ],
)
def test_ends_of_turn_are_found_as_llama_cpp_does(tokens: list[str], keys: dict[str, Any], ends: tuple[int]) -> None:
    assert load(tokens, **keys).eos_token_ids == ends


def test_an_end_of_turn_that_is_called_normal_is_a_control_token() -> None:
    tokenizer = load(["a", "<|eot_id|>"], token_type=[1, 1])
    assert tokenizer.encode("a<|eot_id|>a") == [0, 1, 0]
    assert tokenizer.decode([0, 1, 0]) == "aa"
    vocabulary = read_vocabulary(made(["<|start|>", "<|eot_id|>"], token_type=[3, 1]), "m")
    assert vocabulary.kinds == [USER_DEFINED, CONTROL]


def test_special_tokens_of_a_template_come_from_their_keys() -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}"
    ids: dict[str, Any] = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unknown_token_id": 2,
        "padding_token_id": 3,
        "seperator_token_id": 9,
    }
    metadata = made(["<b>", "<e>", "<u>", "<p>"], **ids) | {"tokenizer.chat_template": template}
    assert gguf_tokenizer(metadata, "m").render_chat([{"role": "user", "content": "x"}]) == "<b><e><u><p>"


def test_added_text_that_looks_like_bytes_comes_out_as_text(metadata: Any) -> None:
    tokenizer = gguf_tokenizer(metadata("deepseek-llm"), "deepseek-llm")
    text = "ø Ñandú õ÷ûý"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_phi_3s_special_tokens_take_the_space_after_them(metadata: Any) -> None:
    tokenizer = gguf_tokenizer(metadata("phi-3"), "phi-3")
    assert tokenizer.encode("<|user|> \n Hi", add_special_tokens=False) == [32010, 6324]
    assert tokenizer.encode("<s>  Hi", add_special_tokens=False) == [1, 259, 6324]
