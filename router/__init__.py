"""PRISM: the router process. `broker` alone touches sockets; all else is pure."""
