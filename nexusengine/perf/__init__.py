"""PURE: how long a step takes. Features of a step, and a model of its duration that learns while serving.

May import types, errors and numpy; never torch, zmq, asyncio, time or random.
"""
