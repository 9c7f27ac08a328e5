"""`nexusengine config`: every setting. docs/configuration.md is its output."""

from __future__ import annotations

import argparse

from nexusengine.config import ServeConfig, markdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    del args
    print(
        "# Settings\n\nEach can be given on the command line, in the environment, or as a key of the TOML file\n"
        "named by `--config`; the first of these that has it counts. This page is the output of `nexusengine config`.\n"
    )
    print(markdown(ServeConfig), end="")
    return 0
