"""Recorded traces: what `nexusengine serve --record-trace FILE` writes and `sim`, `plan` and `bench serve` read.

JSON lines, one a request, without text: format.py. Tenants and prompts are in it as keyed hashes: keys.py. files.py
writes them: bounded, rotated. docs/planning.md documents the keys.
"""
