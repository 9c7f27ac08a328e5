"""`nexusengine models`: the short names that --model knows."""

from __future__ import annotations

import argparse

from nexusengine.loading.aliases import ALIASES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    del args
    width = max(map(len, ALIASES))
    for name, target in ALIASES.items():
        print(f"{name:{width}}  {target}")
    return 0
