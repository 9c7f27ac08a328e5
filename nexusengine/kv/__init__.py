"""PURE: accounting of the paged KV cache. Blocks, reference counts, prefix hashes, block tables; no tensors.

May import types, errors and numpy; never torch, zmq, asyncio, time or random.
"""
