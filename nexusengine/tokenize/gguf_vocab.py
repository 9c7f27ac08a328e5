"""The vocabulary in GGUF metadata: tokens, their kinds, the special ones, and which of them end a turn.

Defaults and corrections are llama.cpp's (src/llama-vocab.cpp, llama_vocab::impl::load): many published files lack keys
or give a token the wrong kind, and people expect of a file what it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.obs.logs import get_logger
from nexusengine.tokenize.gguf_pre import BY_NAME, DEFAULT, Pre

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
_NORMAL = 1
_MODELS = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "gemma4": "BPE over text"}
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}}
_NAMES = ("bos", "eos", "eot", "eom", "unk", "sep", "pad", "cls", "mask")
_KEYS = {"unk": "unknown_token_id", "sep": "seperator_token_id", "pad": "padding_token_id"}
_ENDS_OF_TURN = frozenset(
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    ]
)
_FILL_IN_MIDDLE = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_OLD_KEYS = {"fim_pre": "prefix_token_id", "fim_suf": "suffix_token_id", "fim_mid": "middle_token_id"}
_ENDING_FIM = ("fim_pad", "fim_rep", "fim_sep")
_HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

log = get_logger("tokenizer")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary and the settings of a GGUF file's tokenizer, checked.

    tokens, kinds, scores: one item per id; ids: the way back. kinds: GGUF's numbers, corrected as llama.cpp does.
    special: the ids of bos, eos, unk and so on, where there are any. end_ids: tokens after which nothing follows.
    """

    model: str
    pre: Pre
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    ids: dict[str, int]
    special: dict[str, int]
    end_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    rstrip: frozenset[str] = frozenset()

    def text(self, name: str) -> str | None:
        """The text of the special token `name` (bos, eos, ...), or None."""
        return self.tokens[self.special[name]] if name in self.special else None


class Metadata:
    """Typed access to the keys under tokenizer.ggml, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path | str) -> None:
        self.values, self.path = values, path

    def fail(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {what}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(f"tokenizer.ggml.{key}")
        value = default if value is None else value
        if value is None:
            raise self.fail(f"tokenizer.ggml.{key} is missing")
        if not isinstance(value, kind):
            raise self.fail(f"tokenizer.ggml.{key} is {_short(value)}, which is not of the right type")
        return value

    def items(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> list[Any]:
        """A list of which every item is of `kind`."""
        value: list[Any] = self.get(key, list, default)
        for item in value:
            if not isinstance(item, kind) or isinstance(item, bool) or item != item:
                raise self.fail(f"tokenizer.ggml.{key} holds {_short(item)}, which is not of the right type")
        return value

    def token_id(self, key: str, size: int, default: int | None) -> int | None:
        """A token's id; `default` where the key is missing or names no token."""
        value = self.values.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size:
            return value
        log.warning("%s: tokenizer.ggml.%s is %s, which is no token; it is ignored", self.path, key, _short(value))
        return default


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_vocabulary(values: Mapping[str, Any], path: Path | str) -> Vocabulary:
    """Read the vocabulary from GGUF metadata.

    Raises ModelLoadError naming the key that is missing, wrong or not supported.
    """
    data = Metadata(values, path)
    model = data.get("model", str)
    if model not in _MODELS:
        known = ", ".join(f"{name} ({what})" for name, what in _MODELS.items())
        raise data.fail(f"tokenizer model {model!r} is not supported in GGUF; known: {known}")
    pre = _pre_tokenizer(data, model)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(data.items("tokens", str))]
    if not tokens:
        raise data.fail("tokenizer.ggml.tokens is empty")
    kinds = data.items("token_type", int, [_NORMAL] * len(tokens))[: len(tokens)]
    scores = data.items("scores", (int, float), [0.0] * len(tokens))[: len(tokens)]
    if len(kinds) < len(tokens) or len(scores) < len(tokens):
        short = "token_type" if len(kinds) < len(tokens) else "scores"
        raise data.fail(f"tokenizer.ggml.{short} is malformed: it has fewer items than there are tokens")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if ids.setdefault(token, i) != i:
            raise data.fail(
                f"tokenizer.ggml.tokens is malformed: {_short(token)} is there twice, as {ids[token]} and {i}"
            )
    special = _special_ids(data, model, len(tokens))
    kinds, end_ids = _ends(data, list(kinds), ids, special)
    spm = model == "llama"
    return Vocabulary(
        model,
        pre,
        tokens,
        kinds,
        scores,
        ids,
        special,
        end_ids,
        add_bos=pre is BY_NAME["gemma4"] or data.get("add_bos_token", bool, spm or pre.add_bos),
        add_eos=data.get("add_eos_token", bool, False),
        add_space_prefix=data.get("add_space_prefix", bool, spm),
        rstrip=_rstrip(values, tokens, kinds),
    )


def _pre_tokenizer(data: Metadata, model: str) -> Pre:
    """SentencePiece has none; the value of `pre` means nothing there."""
    if model == "llama":
        return DEFAULT
    name = "gemma4" if model == "gemma4" else data.get("pre", str, "")
    if name in ("", "default"):
        said = "is 'default'" if name else "is missing"
        log.warning(
            "%s: tokenizer.ggml.pre %s, so text is split as llama.cpp does by default; the model may answer worse than "
            "it could: convert it anew",
            data.path,
            said,
        )
        return DEFAULT
    if name not in BY_NAME:
        raise data.fail(f"pre-tokenizer {name!r} is not supported; known: {', '.join(BY_NAME)}")
    return BY_NAME[name]


def _special_ids(data: Metadata, model: str, size: int) -> dict[str, int]:
    found = {}
    for name in _NAMES:
        default = _DEFAULT_IDS.get(model, {}).get(name)
        if default is not None and default >= size:
            default = None
        value = data.token_id(_KEYS.get(name, f"{name}_token_id"), size, default)
        if value is not None:
            found[name] = value
    return found


def _ends(
    data: Metadata, kinds: list[int], ids: dict[str, int], special: dict[str, int]
) -> tuple[list[int], tuple[int, ...]]:
    """Kinds corrected, and the tokens that end generation: by key and by well-known text."""
    ends = {special[name] for name in ("eos", "eot", "eom") if name in special}
    for name, texts in _FILL_IN_MIDDLE.items():
        by_text = min((ids[text] for text in texts.split() if text in ids), default=None)
        by_key = data.token_id(f"{name}_token_id", len(kinds), None)
        if by_key is None and name in _OLD_KEYS:
            by_key = data.token_id(_OLD_KEYS[name], len(kinds), None)
        if by_key is None and by_text is not None:
            kinds[by_text] = CONTROL
        found = by_text if by_key is None else by_key
        if name in _ENDING_FIM and found is not None:
            ends.add(found)
    for text in _ENDS_OF_TURN & ids.keys():
        ends.add(ids[text])
        kinds[ids[text]] = CONTROL
    for text in _HARMONY:
        if text in ids:
            kinds[ids[text]] = USER_DEFINED
    present = _ENDS_OF_TURN & ids.keys()
    # gpt-oss and solar-open end a part of a turn, not the turn, with <|end|>.
    if "<|end|>" in present and present & {"<|call|>", "<|calls|>"} and present & {"<|return|>", "<|flush|>"}:
        ends.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = USER_DEFINED
    # gemma4 has a normal </s>.
    if {"<|tool_response>", "</s>"} <= present:
        ends.discard(ids["</s>"])
        kinds[ids["</s>"]] = _NORMAL
    return kinds, tuple(sorted(ends))


def _rstrip(values: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> frozenset[str]:
    """Special tokens that take the white space after them with them: those of Phi-3, by the model's name."""
    name = values.get("general.name")
    if not isinstance(name, str) or not any(part in name.lower() for part in ("phi-3", "phi3")):
        return frozenset()
    special = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    return frozenset(special | {"</s>"}) - {"<unk>", "<s>", "<|endoftext|>"}
