"""How text is split before byte-pair merging: what a GGUF file means by `tokenizer.ggml.pre`.

The names, their patterns and their defaults are llama.cpp's (src/llama-vocab.cpp, src/unicode.cpp), so that a file
gives the same ids there and here. Where llama.cpp approximates the pattern of the original tokenizer, or leaves out
its normalisation, so does this table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, pre_tokenizers


def _class(ranges: str) -> str:
    """The inside of a character class, from hexadecimal code points and ranges of them."""
    return "".join("-".join(f"\\x{{{end}}}" for end in item.split("-")) for item in ranges.split())


_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Digits in groups of three from the right, found by looking ahead once a run and not once a group.
_GROUPED = r"\P{N}*(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})*(?!\p{N}))|\P{N}*(?<!\p{N})\p{N}{3}|\p{N}{3}|\P{N}+"
_GROUPED_ASCII = r"(?<![0-9])[^0-9]*[0-9]{1,2}(?=(?:[0-9]{3})+(?![0-9]))|[0-9]{3}"
_HAN = _class("4E00-9FFF 3400-4DBF 20000-2A6DF 2A700-2B73F 2B740-2B81F 2B820-2CEAF 2CEB0-2EBEF F900-FAFF 2F800-2FA1F")
_HAN_KANA = f"[{_class('4E00-9FA5 3040-309F 30A0-30FF')}]+"
# llama.cpp's classes that are written without categories do not match white space outside ASCII.
_HAN_HANGUL = f"[{_class('800-9FA5 AC00-D7FF')}&&[^\\s]]+"
_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943 "
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_SUFFIX}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_WORDS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", _HAN_KANA, rf"{_WORDS}[\r\n]*|{_SPACES}")
_LINES = r"[^\n]+|\n+"
_BLOOM = rf" ?[^(\s|.,!?{_class('2026 3002 FF0C 3001 964 6D4 60C')})]+"
_ANY_CASE = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_SUFFIX}?"


def _two_cases(letters: str, suffix: str = "") -> str:
    """Words whose ASCII letters go from upper to lower case. letters: what counts as one; suffix: what may follow."""
    upper, lower = rf"(?:(?={letters})[^a-z])", rf"(?:(?={letters})[^A-Z])"
    return rf"{_LEAD}{upper}*{lower}+{suffix}|{_LEAD}{upper}+{lower}*{suffix}"


_TEKKEN = _two_cases(r"\p{L}")


def _gpt4o(words: str) -> str:
    return rf"{words}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n/]*|{_SPACES}"


@dataclass(frozen=True, slots=True)
class Pre:
    """How text is made ready for byte-pair merging.

    patterns: regular expressions; each splits what the ones before left into its matches and what lies between.
    ignore_merges: a piece that is a token is that token, whatever the merges say.
    add_bos: BOS goes before a prompt where the file does not say.
    raw: tokens are text with U+2581 for spaces, not bytes as GPT-2 writes them.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False

    def build(self) -> Any:
        """Build the pre-tokenizer of the tokenizers library that splits text this way."""
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        if not self.raw:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


DEFAULT = Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2_PRE = Pre((_GPT2,))
_DIGITS_PRE = Pre((r"\p{N}", _GPT2))
_LLAMA3_PRE = Pre((_LLAMA3,))
_QWEN2_PRE = Pre((_QWEN2,))
_BLOOM_PRE = Pre((_BLOOM,))
_AYA_PRE = Pre((_GROUPED, _gpt4o(_ANY_CASE)))
_BAILING_PRE = Pre(
    (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
        rf"|{_LEAD}\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    )
)

_ENTRIES: tuple[tuple[str, Pre], ...] = (
    ("default", DEFAULT),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        replace(_LLAMA3_PRE, ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", _LLAMA3_PRE),
    ("glm4 glm5", replace(_LLAMA3_PRE, ignore_merges=True)),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe a.x-4.0 mellum "
        "modern-bert mpt olmo jais trillion granite-docling exaone4",
        _GPT2_PRE,
    ),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _DIGITS_PRE),
    ("qwen35", Pre((_QWEN35,))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2_PRE),
    (
        "deepseek-llm",
        Pre(
            (
                r"[\r\n]",
                rf"\s?[{_class('41-5A 61-7A ' + _LETTERS)}]+",
                rf"\s?[!-/:-~{_class('FF01-FF0F FF1A-FF5E 2018-201F 3001-3002')}]+",
                r"(?<!\s)\s+\z",
                _HAN_HANGUL,
                r"\p{N}+",
            )
        ),
    ),
    ("deepseek-coder", Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Pre(_DEEPSEEK3)),
    ("spark2_5", Pre((*_DEEPSEEK3[:2], rf"{_WORDS}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"))),
    ("falcon", Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("poro-chat bloom gpt3-finnish", _BLOOM_PRE),
    ("viking", Pre((_BLOOM, r"\p{N}"))),
    (
        "tekken",
        Pre(
            (rf"{_TEKKEN}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}",),
            ignore_merges=True,
            add_bos=True,
        ),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Pre((_gpt4o(_two_cases(r"\p{L}", f"{_SUFFIX}?")),))),
    (
        "granite-embed-multi-97m",
        Pre((_gpt4o(_two_cases(r"[\p{L}\p{M}]", f"{_SUFFIX}?")),), ignore_merges=True),
    ),
    ("tiny_aya cohere2moe", _AYA_PRE),
    (
        "chameleon",
        Pre(
            (
                r"<sentinel:[0-9]+>",
                r"IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            add_bos=True,
        ),
    ),
    (
        "jais-2",
        Pre(
            (
                rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|%s"
                % "|".join(
                    [rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)] + [r"\s{1,2}(?!\S)", r"\s"]
                ),
            )
        ),
    ),
    (
        "kimi-k2",
        Pre((rf"[{_HAN}]+|{_LEAD}(?:(?![{_HAN}])\p{{L}})+{_SUFFIX}?|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}",)),
    ),
    ("superbpe", Pre((r"\p{N}+", _GROUPED_ASCII))),
    ("bailingmoe bailingmoe2 llada-moe", _BAILING_PRE),
    (
        "seed-coder",
        Pre((rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    ),
    ("ufakzeka", Pre((rf"{_LEAD}\p{{L}}+|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}",))),
    (
        "afmoe",
        Pre(
            (
                _GROUPED,
                f"[{_class('4E00-9FFF 3400-4DBF 8C48-FAFF 3040-30FF FF65-FF9F 2F00-2FDF E40-EFF 1780-17FF')}"
                f"{_class('1000-109F AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF')}]+",
                rf"{_WORDS}[\r\n]*|{_SPACES}",
            )
        ),
    ),
    ("laguna", Pre((_LINES, _QWEN2))),
    (
        "exaone-moe",
        Pre(
            (
                rf"{_SUFFIX}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SYMBOLS}[\r\n/]?"
                r"|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    (
        "youtu",
        Pre(
            (
                f"[{_class('AC00-D7A3 3131-318E')}]+|"
                f"[{_class('FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F')}]+|"
                f"[{_class('3105-312F')}]+|{_HAN_KANA}",
                rf"{_ANY_CASE}|\p{{N}}|{_SYMBOLS}[\r\n/]*|{_SPACES}",
            ),
            ignore_merges=True,
        ),
    ),
    (
        "minicpm5",
        Pre((r"\p{N}{1,3}", rf"{_SUFFIX}|{_LEAD}\p{{L}}+|\p{{N}}+|{_SYMBOLS}[\r\n]*|{_SPACES}"), ignore_merges=True),
    ),
    ("gemma4 granite-embed-multi-311m", Pre((_LINES,), ignore_merges=True, add_bos=True, raw=True)),
    ("sarvam-moe", Pre((_LINES,), raw=True)),
)
BY_NAME: dict[str, Pre] = {name: pre for names, pre in _ENTRIES for name in names.split()}
"""Every name that llama.cpp knows but `whitespace`, which is for embedding models alone."""
