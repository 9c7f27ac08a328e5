"""Compare the tokenizers built from GGUF vocabularies with llama.cpp's own, on random texts.

    scripts/compare_tokenizers.py --reference PYTHON [--texts N] [--seed S] [--pre NAME ...] [--store OUT] FILE.gguf ...

PYTHON is the interpreter of an environment that has llama-cpp-python. Compared are the ids of each text (special tokens
in the text are parsed, BOS and EOS are not added), whether BOS and EOS go with a prompt, and the tokens that end
generation. --pre takes the vocabulary of a file with another pre-tokenizer; `--pre all`: with each of them.
--store writes what llama.cpp says of a few texts to the file that tests/unit/tokenize/test_gguf.py reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.tokenize.gguf_pre import BY_NAME
from nexusengine.tokenize.gguf_tokenizer import make_backend
from nexusengine.tokenize.gguf_vocab import CONTROL, USER_DEFINED, Vocabulary, read_vocabulary

_REFERENCE = """
import json, sys
import llama_cpp
job = json.load(sys.stdin)
overrides = {"tokenizer.ggml.pre": job["pre"]} if job["pre"] else None
model = llama_cpp.Llama(job["path"], vocab_only=True, verbose=False, kv_overrides=overrides)
vocab = model._model.vocab
count = llama_cpp.llama_vocab_n_tokens(vocab)
json.dump({
    "ids": [model.tokenize(text.encode(), add_bos=False, special=True) if text else [] for text in job["texts"]],
    "ends": [i for i in range(count) if llama_cpp.llama_vocab_is_eog(vocab, i)],
    "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
    "add_eos": bool(llama_cpp.llama_vocab_get_add_eos(vocab)),
}, sys.stdout)
"""
_SCRIPTS = [(0x20, 0x7E), (0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0xDFF)]
_SCRIPTS += [(0xE00, 0xEFF), (0x1000, 0x10FF), (0x1780, 0x17FF), (0x1E00, 0x1FFF), (0x2000, 0x27FF), (0x3000, 0x30FF)]
_SCRIPTS += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFD), (0x10000, 0x107FF), (0x1D400, 0x1F9FF)]
_PIECES = [
    "'s",
    "'T",
    "'re",
    "'LL",
    "'d",
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    " \n ",
    "1",
    "12",
    "12345",
    "½",
]
_PIECES += [" the", "Hello", "camelCase", "CamelCASE", "naïve", "Élan", "ÉCOLE", "don't", "e\u0301", "\u00a0", "\u3000"]
_PIECES += [
    "。",
    "，",
    "!!",
    "...",
    "--",
    "</",
    "/\n",
    "(",
    "中文",
    "漢字かな",
    "한국어",
    "हिन्दी",
    "ไทย",
    "🦙",
    "👩‍👩‍👧",
    "ſ",
    "\x85",
]
_PIECES += ["a" * 7, "0" * 5, "=" * 9, "-" * 5, " " * 11, "\n" * 5, "\t" * 3, "▁", "▁▁", "<0x0A>", "\u200b", "\ufeff"]


def random_text(rng: random.Random, specials: list[str]) -> str:
    """Words, runs and symbols of many scripts, now and then with a special token."""

    def piece() -> Iterator[str]:
        kind = rng.random()
        if kind < 0.45:
            yield rng.choice(_PIECES)
        elif kind < 0.5 and specials:
            yield rng.choice(specials)
        else:
            low, high = rng.choice(_SCRIPTS)
            yield " " * rng.randrange(2)
            for _ in range(rng.randrange(1, 8)):
                char = chr(rng.randint(low, high))
                if unicodedata.category(char) not in ("Cn", "Cs", "Co"):
                    yield char

    return "".join(part for _ in range(rng.randrange(1, 12)) for part in piece())


def reference(path: Path, pre: str | None, texts: list[str], python: str) -> dict[str, Any]:
    """What llama.cpp makes of `texts`, and what it takes for the ends of generation."""
    job = json.dumps({"path": str(path), "pre": pre, "texts": texts})
    done = subprocess.run([python, "-c", _REFERENCE], input=job, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def store(paths: list[Path], seed: int, python: str, out: Path) -> None:
    """Ids of a few texts for each vocabulary, and a digest of them for gpt-2's with each pre-tokenizer."""
    rng = random.Random(seed)
    texts = [random_text(rng, []) for _ in range(30)]
    ids = {path.stem: reference(path, None, texts, python)["ids"] for path in paths}
    plain = next(path for path in paths if path.stem == "gpt-2")
    digests = {}
    for pre in (name for name in BY_NAME if not BY_NAME[name].raw):
        theirs = reference(plain, pre, texts, python)["ids"]
        digests[pre] = hashlib.sha256(json.dumps(theirs).encode()).hexdigest()[:16]
    out.write_text(json.dumps({"texts": texts, "ids": ids, "pre": digests}, separators=(",", ":")), encoding="utf-8")


def mismatches(path: Path, pre: str | None, count: int, seed: int, python: str) -> tuple[int, list[str]]:
    """(texts compared, what differs)."""
    metadata = dict(GGUFFile(path).metadata)
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    vocabulary = read_vocabulary(metadata, path)
    backend = make_backend(vocabulary, metadata, path)
    rng = random.Random(seed)
    texts = [random_text(rng, _specials(vocabulary)) for _ in range(count)]
    if vocabulary.rstrip:  # of white space after such a token llama.cpp takes ASCII alone, transformers all of it
        texts = [re.sub(r"(?<=>)\s+", " ", text) for text in texts]
    try:
        theirs = reference(path, pre, texts, python)
    except subprocess.CalledProcessError as error:
        return 0, [f"llama.cpp: {error.stderr.strip().splitlines()[-1:]}"]
    ours = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    wrong = [
        f"{text!r}: {mine}, llama.cpp {their}"
        for text, mine, their in zip(texts, ours, theirs["ids"], strict=True)
        if mine != their
    ]
    for name, mine in (("ends", list(vocabulary.end_ids)), ("add_bos", vocabulary.add_bos), ("add_eos", False)):
        if mine != theirs[name]:
            wrong.append(f"{name}: {mine}, llama.cpp {theirs[name]}")
    return len(texts), wrong


def _specials(vocabulary: Vocabulary) -> list[str]:
    kinds = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    return [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED)][:40]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pre", nargs="*", default=[])
    parser.add_argument("--store", type=Path)
    args = parser.parse_args()
    if args.store is not None:
        store(args.files, args.seed, args.reference, args.store)
        return 0
    names: list[str | None] = list(BY_NAME) if args.pre == ["all"] else args.pre or [None]
    failed = False
    for path in args.files:
        for pre in names:
            count, wrong = mismatches(path, pre, args.texts, args.seed, args.reference)
            failed |= bool(wrong)
            print(f"{path.name} {pre or ''}: {count} texts, {len(wrong)} differ", flush=True)
            for line in wrong[:3]:
                print(f"    {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
