"""Load on a running server: what is sent when, the client that sends it, and what came back.

Open loop: a request is sent when its time has come, however many are still under way, and its latency counts from that
time, not from when the client got round to it. May import what the simulator may; never torch, never the engine.
"""
