"""Twenty chat templates with the constructs of published ones, written for these tests, and what each takes.

The templates are the files of templates/: NAME.jinja, or NAME.KIND.jinja where a model has several.

takes: the form of content by role ("text", "parts", "both"), found by reading the template, so that it is a check on
what the product finds out by itself. arguments: whether JSON text must become an object. null: whether a content is
asked to be none. developer: whether the role is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

TEMPLATES = Path(__file__).parent / "templates"


def _read(path: Path) -> str:
    with path.open(newline="") as file:
        return file.read()


@dataclass(frozen=True)
class Case:
    name: str
    takes: str | Mapping[str, str] = "text"
    arguments_as_object: bool = False
    null: bool = False
    developer: bool = False
    tokens: Mapping[str, str] = field(default_factory=lambda: TOKENS)
    variables: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def source(self) -> str | Mapping[str, str]:
        kinds = {path.name.split(".")[1]: _read(path) for path in sorted(TEMPLATES.glob(f"{self.name}.*.jinja"))}
        return kinds or _read(TEMPLATES / f"{self.name}.jinja")

    def form(self, role: str) -> str:
        return self.takes if isinstance(self.takes, str) else self.takes.get(role, self.takes["user"])


CASES = (
    Case("llama", arguments_as_object=True, variables={"day": ("2 Mai 2026",), "place_of_tools": ("system",)}),
    Case("vision", takes="both"),
    Case("guard", takes="parts", variables={"categories": ({"X": "Rudeness"}, None, {})}),
    Case("qwen2", arguments_as_object=True, tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    Case("qwen3", variables={"enable_thinking": (True, False)}),
    Case("mistral", arguments_as_object=True),
    Case("mistral-small", takes={"user": "both", "system": "text", "assistant": "text"}),
    Case("gemma"),
    Case("gemma3", takes={"user": "both", "system": "text", "assistant": "both"}),
    Case("phi3"),
    Case("phi4", tokens={"eos_token": "<|endoftext|>"}),
    Case("deepseek", null=True),
    Case("granite", variables={"thinking": (True,), "controls": ({"length": "long"}, ["citations"], {})}),
    Case("hermes", arguments_as_object=True),
    Case("command"),
    Case("olmo"),
    Case("generation", tokens={}),
    Case("parts", takes="parts"),
    Case("dump", arguments_as_object=True, tokens={"bos_token": "<s>", "sep_token": "[SEP]"}),
    Case("mixed", takes="both", null=True, developer=True, variables={"style": ("bold",), "strict": (True, False)}),
)
