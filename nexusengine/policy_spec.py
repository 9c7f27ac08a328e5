"""Policies by the spec that a user gives, `name` or `name:key=value,key=value`. PURE."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from nexusengine.errors import ConfigError


def make_policy(spec: str, classes: Mapping[str, str], *, kind: str, param: str) -> Any:
    """An instance of the class that the spec names; its module is imported only now.

    Args:
        classes: `module:class` by name.
        kind: what such a policy is called in messages.
        param: the setting that holds the spec.

    Raises:
        ConfigError: the name or an option is not known, or a value is not a number.
    """
    name, _, rest = spec.partition(":")
    if name not in classes:
        raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(sorted(classes))}", param=param)
    options: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, sep, value = item.partition("=")
        try:
            if not sep:
                raise ValueError
            options[key.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"policy option {item!r} is not of the form key=number in {spec!r}", param=param
            ) from None
    module, _, attribute = classes[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(**options)
    except TypeError as error:
        raise ConfigError(f"policy {name!r} does not take these options: {error}", param=param) from None
