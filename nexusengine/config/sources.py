"""Where settings come from: the command line, the environment, a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nexusengine.errors import ConfigError

ENV_PREFIX = "NEXUSENGINE_"
T = TypeVar("T")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, table: type, *, skip: frozenset[str] = frozenset()) -> None:
    """An option for every setting of `table`. Values stay text until `load` parses them: one place, one message."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(table):
        if f.name in skip:
            continue
        name = f.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        default = "" if f.default is None else f" (default: {f.default})"
        help = (f.metadata["help"] + default).replace("%", "%%")
        if isinstance(f.default, bool):
            group.add_argument(
                flag(f.name), help=help, dest=f.name, default=None, action=argparse.BooleanOptionalAction
            )
        else:
            metavar = f.metadata["metavar"] or f.name.rsplit("_", 1)[-1].upper()
            group.add_argument(flag(f.name), help=help, dest=f.name, default=None, metavar=metavar)


def load(
    table: type[T],
    given: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    toml_file: str | Path | None = None,
) -> T:
    """Build `table` from `given` (None means not given), the environment and a TOML file.

    Raises ConfigError naming the setting, where it came from and what it should be.
    """
    environ = os.environ if environ is None else environ
    from_file = _read_toml(Path(toml_file)) if toml_file else {}
    fields = {f.name: f for f in dataclasses.fields(table)}  # type: ignore[arg-type]
    unknown = sorted(set(from_file) - set(fields))
    if unknown:
        raise ConfigError(f"{toml_file}: unknown setting {unknown[0]!r}", param=unknown[0])
    values: dict[str, Any] = {}
    for name, f in fields.items():
        env = ENV_PREFIX + name.upper()
        sources = [
            (flag(name), given.get(name)),
            (env, environ.get(env)),
            (f"{name} in {toml_file}", from_file.get(name)),
        ]
        for source, raw in sources:
            if raw is None:
                continue
            try:
                values[name] = f.metadata["parse"](raw)
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(f"{source}: {error}", param=name) from None
            break
    return table(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text("utf-8-sig")).items()}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", param="config") from None


def markdown(table: type) -> str:
    """The settings of `table` as a Markdown table: docs/configuration.md is made of this."""
    lines = ["| option | environment | default | what it is |", "|---|---|---|---|"]
    for f in dataclasses.fields(table):
        default = "" if f.default is None else f"`{f.default}`"
        lines.append(f"| `{flag(f.name)}` | `{ENV_PREFIX}{f.name.upper()}` | {default} | {f.metadata['help']} |")
    return "\n".join(lines) + "\n"
