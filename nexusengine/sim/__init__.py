"""Discrete-event simulation of engines and router on a virtual clock, with durations from device profiles.

Policies, KV accounting, performance model, plan check, router core and ledger are the objects the real engine runs;
only the device and the passing of time are simulated. May import lens, kv, perf, profiles, core and router.
"""
