"""Tokenizers of each kind against transformers and the tokenizers library, on random texts and random ids.

The byte-level ones are built from the vocabulary of the model that is embedded, the SentencePiece ones from llama.cpp's
llama-spm vocabulary. NEXUSENGINE_TEXTS says how many texts (300).
"""

from __future__ import annotations

import gzip
import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.resolve import resolve_model
from nexusengine.tokenize.gguf_tokenizer import build
from nexusengine.tokenize.gguf_vocab import read_vocabulary
from nexusengine.tokenize.load import json_tokenizer

CASES = Path(__file__).parents[3] / "shared" / "cases" / "tokenizers"
COUNT = int(os.environ.get("NEXUSENGINE_TEXTS", "300"))
SCRIPTS = [(0x20, 0x7E)] * 4 + [(0xA1, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0x1E00, 0x27FF)]
SCRIPTS += [(0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFD), (0x1F300, 0x1FAFF)]
PIECES = [
    "  ",
    " ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "123",
    "Hello",
    " the",
    "e\u0301",
    "\u3000",
    "\u2581",
    "<0x0A>",
    "\x00",
]
PIECES += ["<s>", "</s>", "<unk>", "<|im_end|>", " [X] ", "[Y]  ", "\U0001f999"]


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(0, 12)):
        low, high = rng.choice(SCRIPTS)
        word = "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 7)))
        parts.append(rng.choice([rng.choice(PIECES), word, f" {word}"]))
    return "".join(char for char in "".join(parts) if unicodedata.category(char) != "Cs")


def metadata_of(folder: Path, kind: str) -> dict[str, Any]:
    if kind == "byte-level":
        return GGUFFile(resolve_model("smollm2-135m").path).metadata
    packed = CASES / "llama-spm.gguf.gz"
    if not packed.is_file():
        pytest.skip(f"{packed} is not there: it comes beside the checkout, not with it")
    (folder / "spm.gguf").write_bytes(gzip.decompress(packed.read_bytes()))
    return GGUFFile(folder / "spm.gguf").metadata


def backend(folder: Path, form: str) -> Any:
    """tokenizer.json of one form, as a JSON value."""
    made = build(metadata_of(folder, "byte-level" if form.startswith("byte-level") else "spm"), "m")
    if form == "metaspace":
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif form == "byte-level, normalized":
        made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    elif form == "added tokens with flags":
        made.add_tokens(
            [AddedToken("[X]", lstrip=True, rstrip=True, normalized=True), AddedToken("[Y]", single_word=True)]
        )
        made.add_special_tokens([AddedToken("<|im_end|>", rstrip=True)])
    if form == "bos by post-processor":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    value = json.loads(made.to_str())
    if form == "ids with holes, in no order":
        vocabulary = list(value["model"]["vocab"].items())
        random.Random(1).shuffle(vocabulary)
        value["model"]["vocab"] = {token: i if i < 5000 else i + 1000 for token, i in vocabulary}
    return value


@pytest.mark.model
@pytest.mark.parametrize(
    "form",
    [
        *("byte-level", "byte-level, normalized", "byte fallback", "metaspace", "added tokens with flags"),
        *("bos by post-processor", "ids with holes, in no order"),
    ],
)
def test_text_and_ids_are_those_of_transformers(tmp_path: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend(tmp_path, form)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), json_tokenizer(tmp_path, None, ())
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(6)
    known = sorted(plain.get_vocab().values())
    for _ in range(COUNT):
        text = random_text(rng)
        ids = ours.encode(text)
        assert ids == theirs.encode(text) == plain.encode(text).ids, ascii(text)
        some = [rng.choice(known) for _ in range(rng.randrange(0, 20))]
        for these in (ids, some):
            for skip in (True, False):
                whole = ours.decode(these, skip)
                assert whole == plain.decode(these, skip_special_tokens=skip)
                assert whole == theirs.decode(these, skip_special_tokens=skip), these


@pytest.mark.parametrize(("name", "architecture"), [("llama-spm", "phi3"), ("gpt-2", "gpt2"), ("qwen2", "qwen2")])
def test_a_gguf_tokenizer_is_that_of_transformers(tmp_path: Path, name: str, architecture: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    packed = CASES / f"{name}.gguf.gz"
    if not packed.is_file():
        pytest.skip(f"{packed} is not there: it comes beside the checkout, not with it")
    (tmp_path / "m.gguf").write_bytes(gzip.decompress(packed.read_bytes()))
    values = {key.removeprefix("tokenizer.ggml."): v for key, v in GGUFFile(tmp_path / "m.gguf").metadata.items()}
    keys = ("tokens", "token_type", "merges", "scores")
    described = {key: values[key] for key in keys if key in values}
    described |= {"tokenizer_type": values["model"], "pre_tokenizer_type": values.get("pre")}
    theirs, _ = mapping.convert_gguf_tokenizer(architecture, described)
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    ours, vocabulary = build(metadata, "m"), read_vocabulary(metadata, "m")
    # llama.cpp calls a token that is written </s> an end of turn, transformers goes by the file alone.
    known = [i for i, kind in enumerate(values["token_type"]) if vocabulary.kinds[i] == kind]
    rng = random.Random(7)
    specials = [piece for piece in PIECES if piece.startswith("<")]
    for _ in range(COUNT):
        text = random_text(rng)
        if any(special in text for special in specials):  # transformers knows fewer of them
            continue
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)
        some = [rng.choice(known) for _ in range(rng.randrange(0, 20))]
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(some) == theirs.decode(some)


def test_the_decoder_of_a_sentencepiece_vocabulary_joins_bytes(tmp_path: Path) -> None:
    made = build(metadata_of(tmp_path, "spm"), "m")
    reference = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    for ids in ([29871, 243, 162, 169, 156], [29871, 243, 162], [15043, 3186], [243, 15043], [13, 13]):
        tokens = [token for i in ids if (token := made.id_to_token(i)) is not None]
        assert len(tokens) == len(ids)
        assert made.decode(ids) == reference.decode(tokens)
    assert made.decode([29871, 243, 162, 169, 156]) == "\U0001f999"
