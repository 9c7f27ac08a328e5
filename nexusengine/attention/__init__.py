"""Attention over a paged KV cache: one backend a file behind the protocol in `base`; `registry` picks one."""
