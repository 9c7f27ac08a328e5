"""PURE: the engine scheduler. A view of the engine goes in, the plan of one step comes out.

May import types, errors, slo, perf, kv and numpy; never torch, zmq, asyncio, time or random. Time is an argument, so
the same objects run in the engine, in the simulator and in a property test.
"""
