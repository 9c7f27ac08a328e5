"""The tokenizer rebuilt from GGUF metadata against transformers' own reading of the same file."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nexusengine.loading.resolve import resolve_model
from nexusengine.tokenize import Tokenizer, load_tokenizer

pytestmark = pytest.mark.model
TEXTS = [
    "Hello, world!",
    "  leading and trailing  ",
    "1234567890 3.14159 1,000",
    "def f(x):\n\treturn x ** 2\n\n\n",
    "naïve café Ångström ﬁ",
    "日本語のテキスト 中文 한국어 עברית العربية",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈",
    "I'm you're we'll they'd it's",
    "<|im_start|>user\nhi<|im_end|>",
    "a" * 300,
    "\u200b\ufeff\u00a0 \r\n",
    "",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "  Bye\n"},
    ],
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(resolve_model("smollm2-135m"))


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    path = resolve_model("smollm2-135m").path
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers_and_decode_to_the_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("messages", CHATS)
def test_chats_are_rendered_as_transformers_does(ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]]) -> None:
    assert ours.render_chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_streamed_text_is_the_whole_text_for_any_tokens(ours: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(200):
        top = rng.choice([ours.vocab_size, 300])
        ids = [rng.randrange(top) for _ in range(rng.randrange(1, 120))]
        stream, out, at = ours.stream(), "", 0
        while at < len(ids):
            step = rng.randint(1, 4)
            out += stream.push(ids[at : at + step])
            at += step
        assert out + stream.finish() == ours.decode(ids)
