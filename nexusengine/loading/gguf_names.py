"""GGUF files by their names: parts of one model, and which of several quantisations is meant.

As llama.cpp names them: `NAME-Q4_K_M.gguf`, or `NAME-Q4_K_M-00001-of-00003.gguf` and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from nexusengine.errors import ModelLoadError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_TAG = re.compile(r"[-.]((?:I?Q|TQ)\d\w*|B?F16|FP16|F32|(?:MX|NV)FP4\w*)$", re.IGNORECASE)
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_DEFAULTS = ("Q4_K_M", "Q8_0")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A model as one or more GGUF files.

    Attributes:
        quantisation: as the name ends, in capitals (`Q4_K_M`); "" if it says none.
        parts: file names, first to last.
        missing: those that the others' names count and that are not there.
    """

    quantisation: str
    parts: tuple[str, ...]
    missing: tuple[str, ...] = ()


def part_names(name: str, count: int) -> tuple[str, ...]:
    """The names of all parts of a split model, of which one is `name`.

    Raises:
        ModelLoadError: that is not the name of one of `count` parts.
    """
    found = _PART.fullmatch(name)
    if not found or int(found[3]) != count:
        raise ModelLoadError(
            f"{name} says that it is one of {count} parts, which its name does not; "
            f"parts are named NAME-00001-of-{count:05d}.gguf"
        )
    return tuple(f"{found[1]}-{i:05d}-of-{found[3]}.gguf" for i in range(1, count + 1))


def models(names: Iterable[str]) -> list[Quantised]:
    """The models among files, in the order of their names. Projectors, importance matrices and draft heads are none."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name.lower()
        if base.endswith(".gguf") and not any(word in base for word in _NO_MODEL):
            part = _PART.fullmatch(name)
            groups.setdefault(f"{part[1]}-of-{part[3]}" if part else name, []).append(name)
    found = []
    for there in groups.values():
        part = _PART.fullmatch(there[0])
        whole = part_names(there[0], int(part[3])) if part else tuple(there)
        tag = _TAG.search(part[1] if part else there[0][: -len(".gguf")])
        missing = tuple(name for name in whole if name not in there)
        found.append(Quantised(tag[1].upper() if tag else "", whole, missing))
    return found


def choose(names: Iterable[str], quantisation: str, where: str) -> Quantised:
    """The model of a quantisation, or of a file's name.

    With none named, Q4_K_M, else Q8_0, as llama-server takes it, else the only one there is.

    Raises:
        ModelLoadError: that is none, or several; lists the choices.
    """
    known = models(names)
    if not known:
        raise ModelLoadError(f"{where} has no .gguf file")
    if quantisation.lower().endswith(".gguf"):
        found = [model for model in known if quantisation in model.parts]
    elif quantisation:
        found = [model for model in known if model.quantisation == quantisation.upper()]
        if not found:  # also where the name goes on: NAME.Q4_K_M-imat.gguf
            pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quantisation)}[.-]", re.IGNORECASE)
            found = [model for model in known if pattern.search(model.parts[0])]
    else:
        preferred = ([model for model in known if model.quantisation == tag] for tag in _DEFAULTS)
        found = next((some for some in preferred if some), known)
    if not found:
        choices = ", ".join(dict.fromkeys(model.quantisation or model.parts[0] for model in known))
        raise ModelLoadError(f"{where} has no GGUF file {quantisation}; it has {choices}")
    if len(found) > 1:
        files = ", ".join(model.parts[0] for model in found)
        kind = f" of {quantisation}" if quantisation else ""
        raise ModelLoadError(
            f"{where} has {len(found)} GGUF models{kind}: {files}; name one, as {where}:{found[0].parts[0]}"
        )
    if found[0].missing:
        raise ModelLoadError(f"{where}: of {found[0].parts[0]} the part {found[0].missing[0]} is missing")
    return found[0]
