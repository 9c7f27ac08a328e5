"""Where a model's files keep its chat templates: one text, or several by their names, as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.files import read_json
from nexusengine.obs.logs import get_logger

log = get_logger("model")


def of_folder(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; empty if there is none that is called "default".

    From chat_template.jinja, else chat_template.json, else tokenizer_config.json (`settings`), which both can hold
    several; additional_chat_templates/NAME.jinja adds others.
    Raises ModelLoadError naming the file.
    """
    if (folder / "chat_template.jinja").is_file():
        found = {"default": _read(folder / "chat_template.jinja")}
    else:
        if (folder / "chat_template.json").is_file():
            settings = read_json(folder / "chat_template.json")
        found = _named(settings.get("chat_template"), f"{folder}: chat_template")
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found |= {path.name.removesuffix(".jinja"): _read(path) for path in others}
    return _with_default(found, folder)


def of_gguf(metadata: Mapping[str, Any], path: Path | str) -> dict[str, str]:
    """The chat templates in GGUF metadata, by name: tokenizer.chat_template and tokenizer.chat_template.NAME.

    Raises ModelLoadError naming the key.
    """
    key = "tokenizer.chat_template"
    found = _named(metadata.get(key), f"{path}: {key}")
    for name, template in metadata.items():
        if name.startswith(key + "."):
            found |= {name.removeprefix(key + "."): _text(template, f"{path}: {name}")}
    return _with_default(found, path)


def _named(value: Any, where: str) -> dict[str, str]:
    """A template, or a list of objects with name and template."""
    if value is None or value == "":
        return {}
    if not isinstance(value, list):
        return {"default": _text(value, where)}
    wrong = next((item for item in value if not isinstance(item, dict) or not isinstance(item.get("name"), str)), None)
    if wrong is not None:
        raise ModelLoadError(f"{where} holds {wrong!r:.200}, which is no object with name and template")
    return {item["name"]: _text(item.get("template"), f"{where} {item['name']!r}") for item in value}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ModelLoadError(f"{where} is {value!r:.200}, which is not a string")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path} is not valid UTF-8 at byte {error.start}") from None


def _with_default(found: dict[str, str], where: Path | str) -> dict[str, str]:
    if found and "default" not in found:
        log.warning("%s: there are chat templates called %s, but no default; none is used", where, ", ".join(found))
        return {}
    return found
