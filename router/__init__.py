"""PRISM: the router process. `policy`, `ledger` and `registry` are pure; `broker` alone touches sockets."""
