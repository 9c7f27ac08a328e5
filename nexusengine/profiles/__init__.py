"""PURE: how long steps take on devices that are not here, composed of what others measured on them.

May import types, errors, model_config, perf and numpy. A profile answers for any mixed batch; the simulator and
emulated devices run on it.
"""
