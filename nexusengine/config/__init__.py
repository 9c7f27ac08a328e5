"""Settings: one typed table that makes the CLI options, TOML keys, environment names and docs/configuration.md.

A setting's value comes from, strongest first: the command line, NEXUSENGINE_<NAME> in the environment, the TOML file,
the default. Standard library only.
"""

from nexusengine.config.devices import DeviceSpec, count_cuda_devices, parse_device, parse_devices
from nexusengine.config.parsers import parse_bool, parse_bytes, whole
from nexusengine.config.settings import DEFAULT_MODEL, EngineConfig, Quantization, ServeConfig
from nexusengine.config.sources import ENV_PREFIX, add_arguments, flag, load, markdown

__all__ = [
    "DEFAULT_MODEL",
    "ENV_PREFIX",
    "DeviceSpec",
    "EngineConfig",
    "Quantization",
    "ServeConfig",
    "add_arguments",
    "count_cuda_devices",
    "flag",
    "load",
    "markdown",
    "parse_bool",
    "parse_bytes",
    "parse_device",
    "parse_devices",
    "whole",
]
