"""Which promise a request asks for: configured classes, the body's `slo` field, headers, a Python argument. PURE.

Every way leads to an SLOClass, because a promise may depend on the prompt's length, which is known later. Strongest
first: the body's field, the headers, the default class; the first that says anything counts alone. Within it, bounds
given in numbers replace those of the class it names, or of the default class where it names none.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from nexusengine.errors import ConfigError, InvalidRequest
from nexusengine.slo.classes import CLASSES, SLOClass, load_classes
from nexusengine.types import SLO

NONE, CUSTOM = "none", "custom"
"""No promise; a promise that is none of the configured classes. Neither can be the name of a class."""
PREFERRED_DEFAULT = "standard"
MAX_CLASSES = 32
SLOLike = SLO | SLOClass | str | None
"""What Python callers may pass as `slo`: a string is the name of a class, None no promise."""
_BOUNDS_MS = {"ttft_ms": (1.0, 86_400_000.0), "tpot_ms": (0.1, 3_600_000.0), "e2e_ms": (1.0, 86_400_000.0)}
_PATIENCE = (1.0, 1000.0)
_NUMBERS = (*_BOUNDS_MS, "patience")
_HEADERS = {"x-slo-class": "class", **{f"x-slo-{b.replace('_', '-')}": b for b in _NUMBERS}}


@dataclass(frozen=True, slots=True)
class SLOClasses:
    """by_name: what requests can ask for. default: of requests that ask for nothing; None: no promise."""

    by_name: Mapping[str, SLOClass]
    default: SLOClass | None = None

    @classmethod
    def configured(cls, file: str | Path | None = None, default: str | None = None) -> SLOClasses:
        """Classes from a TOML file (see slo.classes.load_classes), or the three built in.

        Args:
            file: None: those built in.
            default: name of the default class. None: `standard` if there is such a class, else no SLO.

        Raises:
            ConfigError: the file cannot be used, or the default class is not in it.
        """
        by_name: Mapping[str, SLOClass] = CLASSES if file is None else load_classes(file)[0]
        for name in by_name:
            if name in (NONE, CUSTOM) or not 0 < len(name) <= 64 or not name.isprintable():
                raise ConfigError(f"{file}: {name!r} cannot be the name of a class", param="slo_classes")
        if len(by_name) > MAX_CLASSES:
            raise ConfigError(f"{file} has {len(by_name)} classes; at most {MAX_CLASSES}", param="slo_classes")
        if default is None:
            return cls(by_name, by_name.get(PREFERRED_DEFAULT))
        if default != NONE and default not in by_name:
            raise ConfigError(
                f"--default-slo-class: {default!r} is none of {', '.join([*by_name, NONE])}", param="default_slo_class"
            )
        return cls(by_name, by_name.get(default))

    def wanted(self, body: Any, headers: Mapping[str, Sequence[str]]) -> SLOClass | None:
        """body: the value of the field `slo`, None if there is none. headers: by lower-case name, all values of each.

        Raises InvalidRequest naming the field or the header at fault, also of headers that the body's field outweighs.
        """
        from_headers = self._of_headers(headers)
        if body is not None:
            return self._of_body(body)
        if from_headers:
            return self._of({key: value for key, (_, value) in from_headers.items()}, _spelling(from_headers))
        return self.default

    def named(self, name: str, param: str = "slo") -> SLOClass | None:
        """None for "none". Raises InvalidRequest listing what there is."""
        if name == NONE:
            return None
        if name not in self.by_name:
            known = ", ".join([*self.by_name, NONE])
            raise InvalidRequest(f"{param}: unknown class {name[:64]!r}; known: {known}", param=param)
        return self.by_name[name]

    def in_python(self, slo: SLOLike) -> SLOClass | None:
        """Raises InvalidRequest."""
        if slo is None or isinstance(slo, SLOClass):
            return slo
        if isinstance(slo, SLO):
            return SLOClass(CUSTOM, slo.ttft_s, slo.tpot_s, e2e_s=slo.e2e_s, patience=slo.patience)
        if isinstance(slo, str):
            return self.named(slo)
        raise InvalidRequest(f"slo must be an SLO or the name of a class, got {slo!r}", param="slo")

    def _of_body(self, body: Any) -> SLOClass | None:
        if isinstance(body, str):
            return self.named(body)
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"slo must be the name of a class or an object, got {reprlib.repr(body)}", param="slo")
        given: dict[str, Any] = {}
        for key, value in body.items():
            if key != "class" and key not in _NUMBERS:
                known = ", ".join(["class", *_NUMBERS])
                raise InvalidRequest(f"slo.{key[:64]} is unknown; known: {known}", param=f"slo.{key[:64]}")
            if value is None:
                continue
            if key == "class" and not isinstance(value, str):
                shown = reprlib.repr(value)
                raise InvalidRequest(f"slo.class must be the name of a class, got {shown}", param="slo.class")
            given[key] = value if key == "class" else _checked(f"slo.{key}", key, value)
        if not given:
            raise InvalidRequest("slo is an empty object; name a class or a bound in it", param="slo")
        return self._of(given, {key: f"slo.{key}" for key in ("class", *_NUMBERS)})

    def _of_headers(self, headers: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, Any]]:
        """(header, value) by key of the body's object."""
        given: dict[str, tuple[str, Any]] = {}
        for header, key in _HEADERS.items():
            values = headers.get(header, ())
            if not values:
                continue
            if len(values) > 1:
                raise InvalidRequest(f"{header} is there {len(values)} times", param=header)
            text = values[0].strip()
            if key == "class":
                self.named(text, header)
                given[key] = (header, text)
                continue
            try:
                number = float(text)
            except ValueError:
                _not_a_number(header, text, "ms" if key in _BOUNDS_MS else "TTFTs")
            given[key] = (header, _checked(header, key, number, text))
        return given

    def _of(self, given: Mapping[str, Any], spelling: Mapping[str, str]) -> SLOClass | None:
        """given: a class's name and bounds in milliseconds. spelling: how the request wrote each key."""
        base = self.named(given["class"], spelling["class"]) if "class" in given else self.default
        changed = {
            key.replace("_ms", "_s"): value / 1e3 if key in _BOUNDS_MS else value
            for key, value in given.items()
            if key != "class"
        }
        if not changed:
            return base
        if base is None:
            for key in ("ttft_ms", "tpot_ms"):
                if key not in given:
                    param = spelling.get(key, key)
                    raise InvalidRequest(f"{param} is missing, and there is no class to take it from", param=param)
            return SLOClass(CUSTOM, **changed)
        per_token_s = 0.0 if "ttft_s" in changed else base.ttft_per_token_s
        return replace(base, name=CUSTOM, ttft_per_token_s=per_token_s, **changed)


def _spelling(given: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    names = {key: header for header, key in _HEADERS.items()}
    return names | {key: header for key, (header, _) in given.items()}


def _checked(param: str, key: str, value: Any, text: str | None = None) -> float:
    low, high = _BOUNDS_MS.get(key, _PATIENCE)
    unit = "ms" if key in _BOUNDS_MS else "TTFTs"
    if isinstance(value, bool) or not isinstance(value, int | float):
        _not_a_number(param, value, unit)
    if not low <= value <= high:  # NaN is not either
        shown = reprlib.repr(value if text is None else text)
        raise InvalidRequest(f"{param} must be between {low:g} and {high:.0f} {unit}, got {shown}", param=param)
    return float(value)


def _not_a_number(param: str, value: Any, unit: str) -> NoReturn:
    spelled = "milliseconds" if unit == "ms" else unit
    raise InvalidRequest(f"{param} must be a number of {spelled}, got {reprlib.repr(value)}", param=param)
