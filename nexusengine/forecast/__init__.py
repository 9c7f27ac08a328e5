"""PURE: what an engine will do with the prompts it has: in which order it serves them, and how fast.

The router forecasts its workers with it, and each worker itself. May import types, slo, perf, wire, scheduler and
numpy; never torch, zmq, asyncio, time or random.
"""
